// Package azure signs in nowhere: a Prometheus of Azure's is none of the stack's.
package azure

import (
	"errors"
	"net/http"

	"github.com/go-logr/logr"

	"github.com/kedacore/keda/v2/apis/keda/v1alpha1"
)

// Parameters of a TriggerAuthentication, which no scaler of this build reads.
const (
	ServicePrincipalAuthKey                      = "principal"
	ServicePrincipalTenantIDKey                  = "principal.tenant"
	ServicePrincipalClientIDKey                  = "principal.client"
	ServicePrincipalCloudKey                     = "principal.cloud"
	ServicePrincipalActiveDirectoryEndpointKey   = "principal.directory"
	ServicePrincipalClientSecretKey              = "principal.secret"
	ServicePrincipalClientCertificateKey         = "principal.certificate"
	ServicePrincipalClientCertificatePasswordKey = "principal.password"
)

// TryAndGetAzureManagedPrometheusHTTPRoundTripper refuses whoever asks for Azure's identity; nil for all others.
func TryAndGetAzureManagedPrometheusHTTPRoundTripper(_ logr.Logger, identity v1alpha1.AuthPodIdentity, _ map[string]string) (http.RoundTripper, error) {
	if identity.Provider == v1alpha1.PodIdentityProviderAzureWorkload {
		return nil, errors.New("this KEDA was built without Azure")
	}
	return nil, nil
}
