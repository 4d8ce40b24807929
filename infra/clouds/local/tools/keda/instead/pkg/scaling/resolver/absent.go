package resolver

import (
	"fmt"

	"github.com/kedacore/keda/v2/apis/keda/v1alpha1"
)

// absent is a store of secrets that this build does not know: a TriggerAuthentication that names it is refused.
type absent string

func (store absent) Initialize(...any) error {
	return fmt.Errorf("this KEDA was built without %s: use a Secret (secretTargetRef)", string(store))
}

func (store absent) Read(...any) (string, error) { return "", store.Initialize() }

func (store absent) ResolveSecrets([]v1alpha1.VaultSecret) ([]v1alpha1.VaultSecret, error) {
	return nil, store.Initialize()
}

func (absent) Stop() {}

// The stores that the resolver asks for.
func NewHashicorpVaultHandler(...any) absent   { return "HashiCorp's Vault" }
func NewAzureKeyVaultHandler(...any) absent    { return "Azure's Key Vault" }
func NewGCPSecretManagerHandler(...any) absent { return "Google's Secret Manager" }
func NewAwsSecretManagerHandler(...any) absent { return "AWS' Secrets Manager" }

// vaultAddressesEqual holds for none, so that an operator that is told which vaults it may ask is refused at its start.
func vaultAddressesEqual(string, string) bool { return false }

// DefaultVaultKubernetesAuthTokenFile is no file: no vault is logged in to.
const DefaultVaultKubernetesAuthTokenFile = ""
