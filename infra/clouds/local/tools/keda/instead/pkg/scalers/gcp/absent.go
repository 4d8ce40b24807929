// Package gcp signs in nowhere: a Prometheus of Google's is none of the stack's.
package gcp

import (
	"errors"
	"net/http"

	"github.com/kedacore/keda/v2/apis/keda/v1alpha1"
	"github.com/kedacore/keda/v2/pkg/scalers/scalersconfig"
)

// GcpScopeMonitoringRead is what would be asked for.
const GcpScopeMonitoringRead = ""

// ErrGoogleApplicationCrendentialsNotFound says that nobody asks for Google's identity.
var ErrGoogleApplicationCrendentialsNotFound = errors.New("no credentials of Google's")

// GetGCPOAuth2HTTPTransport refuses whoever asks for Google's identity.
func GetGCPOAuth2HTTPTransport(config *scalersconfig.ScalerConfig, _ http.RoundTripper, _ ...string) (http.RoundTripper, error) {
	if config.PodIdentity.Provider == v1alpha1.PodIdentityProviderGCP {
		return nil, errors.New("this KEDA was built without GCP")
	}
	return nil, ErrGoogleApplicationCrendentialsNotFound
}
