"""What several programs of the cluster are built from is one version of it, so that it is compiled once for all of them."""

import re
from pathlib import Path

import pytest

from infra.clouds.local.golang import TOOLS

# Of these they need newer ones themselves; and Caddy is a server to the one, a parser to Kubernetes.
APART = {
    "coredns": ("github.com/coredns/caddy",),
    "keda": (
        "go.opentelemetry.io/",
        "github.com/grpc-ecosystem/go-grpc-middleware/",
        "github.com/stoewer/go-strcase",
    ),
    "metrics-server": (),
    "prometheus": ("go.opentelemetry.io/",),
    "prometheus-operator": (),
}


def versions(text: str) -> dict[str, str]:
    """Module → version that is built, of a go.mod."""
    required = dict(re.findall(r"^(?:require |\t)(\S+) (v\S+)", text, re.MULTILINE))
    return required | dict(re.findall(r"^(?:replace |\t)(\S+) => \S+ (v\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize(("name", "apart"), APART.items())
def test_modules_that_kubernetes_needs_too_have_its_version(name: str, apart: tuple[str, ...]) -> None:
    ours, kubernetes = (versions(Path(TOOLS, of, "go.mod").read_text()) for of in (name, "kubernetes"))
    shared = [module for module in ours if module in kubernetes and not module.startswith(apart or "-")]
    assert len(shared) > 20
    assert {module: ours[module] for module in shared} == {module: kubernetes[module] for module in shared}
