"""What holds for every manifest of every shipped stack."""

import json
import re
import shutil
import subprocess
import zipfile
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from .conftest import Objects

MODULES = {
    "sigs.k8s.io/karpenter@v1.15.0": ("pkg/apis/crds/karpenter.sh_nodepools.yaml",),
    "github.com/aws/karpenter-provider-aws@v1.15.1": ("pkg/apis/crds/karpenter.k8s.aws_ec2nodeclasses.yaml",),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": tuple(
        f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
        for kind in ("servicemonitors", "podmonitors", "prometheusrules")
    ),
}
CUSTOM = ("karpenter.sh/", "karpenter.k8s.aws/", "monitoring.coreos.com/")


def is_custom(manifest: dict[str, Any]) -> bool:
    return manifest["apiVersion"].startswith(CUSTOM)


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36"])
def test_kubernetes_accepts_every_object(stack: Objects, version: str) -> None:
    checked = [m for m in stack.all if not is_custom(m)]
    for manifest in checked:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
    assert len(checked) > 30


def test_the_schema_would_refuse_a_wrong_object(local: Objects) -> None:
    deployment = json.loads(json.dumps(local.one("Deployment", "chat")))
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolicyy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.36", strict=True)


@cache
def schemas() -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) → schema, from the Go modules that publish the CRDs."""
    found: dict[tuple[str, str], Any] = {}
    for module, files in MODULES.items():
        done = subprocess.run(["go", "mod", "download", "-json", module], capture_output=True, text=True, timeout=300)
        # The archive is there even where the module's own Go version is newer than the one installed.
        archive = json.loads(done.stdout or "{}").get("Zip")
        if not archive:
            pytest.skip(f"the Go module {module} cannot be had: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(archive) as files_of_module:
            for file in files:
                crd = yaml.safe_load(files_of_module.read(f"{module}/{file}"))["spec"]
                for version in crd["versions"]:
                    key = (f"{crd['group']}/{version['name']}", crd["names"]["kind"])
                    found[key] = version["schema"]["openAPIV3Schema"]
    return found


def closed(schema: Any) -> Any:
    """The schema without room for unknown keys: a misspelt field is pruned by the API server, and silently lost."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(inner.get("properties"), dict) and not inner.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


@pytest.mark.skipif(
    shutil.which("go") is None, reason="Go, which fetches the modules that publish the CRDs, is not on PATH"
)
def test_custom_resources_fit_the_schemas_of_their_definitions(stack: Objects) -> None:
    for manifest in filter(is_custom, stack.all):
        schema = schemas()[manifest["apiVersion"], manifest["kind"]]
        spec = closed(schema["properties"]["spec"])
        errors = jsonschema.Draft202012Validator(spec).iter_errors(manifest["spec"])
        assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_no_image_is_latest_or_untagged(stack: Objects) -> None:
    for container in stack.containers():
        tag = container["image"].rsplit("/", 1)[-1].partition(":")[2]
        assert tag, container["image"]
        assert tag != "latest"


def test_pods_are_restricted(stack: Objects) -> None:
    labels = stack.one("Namespace", stack.kind("Namespace")[0]["metadata"]["name"])["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in stack.pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 65532
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not any(key in spec for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in spec["volumes"])
    for container in stack.containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_container_has_room_to_write_and_limits(stack: Objects) -> None:
    for container in stack.containers():
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_ports_are_told_to_the_process_by_name(stack: Objects) -> None:
    for container in stack.containers():
        told = {v["name"]: v.get("value") for v in container["env"] if v["name"].endswith("_PORT")}
        assert told == {f"{p['name'].upper()}_PORT": str(int(p["containerPort"])) for p in container.get("ports", [])}


def test_variables_are_defined_before_they_are_used(stack: Objects) -> None:
    for container in stack.containers():
        used = set(re.findall(r"\$\((\w+)\)", " ".join([*container["command"], *container.get("args", [])])))
        assert used <= {variable["name"] for variable in container["env"]}


def test_everything_mounted_exists(stack: Objects) -> None:
    for pod in stack.pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in stack.names("PersistentVolumeClaim")
            if "configMap" in volume:
                assert volume["configMap"]["name"] in stack.names("ConfigMap")
        assert pod["spec"]["serviceAccountName"] in stack.names("ServiceAccount")


def selects(wanted: dict[str, str] | None, pod: dict[str, Any]) -> bool:
    return (wanted or {}).items() <= pod["metadata"]["labels"].items()


def test_services_select_pods_that_have_their_port(stack: Objects) -> None:
    for service in stack.kind("Service"):
        pods = [pod for pod in stack.pods() if selects(service["spec"]["selector"], pod)]
        assert len(pods) == 1, service["metadata"]["name"]
        names = {port["name"] for container in pods[0]["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_budgets_and_deployments_select_their_own_pods(stack: Objects) -> None:
    for kind in ("PodDisruptionBudget", "Deployment"):
        for manifest in stack.kind(kind):
            assert any(selects(manifest["spec"]["selector"]["matchLabels"], pod) for pod in stack.pods())


def test_names_fit_kubernetes(stack: Objects) -> None:
    for manifest in stack.all:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", manifest["metadata"]["name"])


def test_nothing_that_takes_hours_is_awaited(stack: Objects) -> None:
    for kind in ("Job", "Deployment", "PersistentVolumeClaim", "HorizontalPodAutoscaler"):
        for manifest in stack.kind(kind):
            assert manifest["metadata"]["annotations"]["pulumi.com/skipAwait"] == "true"


def test_everything_is_labelled_for_cost_reports(stack: Objects) -> None:
    for manifest in stack.all:
        assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "slipway"
        assert "slipway.dev/team" in manifest["metadata"]["labels"]


def test_configs_are_immutable_and_named_by_their_content(stack: Objects) -> None:
    mounted = {
        volume["configMap"]["name"]
        for pod in stack.pods()
        for volume in pod["spec"]["volumes"]
        if "configMap" in volume
    }
    for name in mounted:
        assert stack.one("ConfigMap", name)["immutable"] is True
        assert re.search(r"-[0-9a-f]{10}$", name)
