"""`slipway check`: Kubernetes manifests that others wrote, held to the rules of `infra.checks`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
import yaml

from infra.checks import check_manifests
from infra.checks.objects import POD_KINDS, kind_of, name_of, pod_spec
from infra.cli.project import AsJson, Refusal, people, print_json
from infra.cli.show import show_findings

SUFFIXES = (".yaml", ".yml", ".json")


def check(
    paths: Annotated[list[Path], typer.Argument(help="Manifests (YAML or JSON), and folders of them.")],
    json: AsJson = False,
) -> None:
    """Hold Kubernetes manifests that others wrote to Slipway's rules: GPUs, probes, roll-outs, scaling, security.

    Exits 2 when a finding is an error.
    """
    manifests = [manifest for path in paths for file in _files(path) for manifest in _read(file)]
    findings = check_manifests(manifests)
    if json:
        print_json({"manifests": len(manifests), "findings": [finding.to_json() for finding in findings]})
    else:
        show_findings(findings, console=people)
        people.print(f"{len(manifests)} manifests, {len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}")
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(2)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and not file.name.startswith("."))
    if not path.is_file():
        raise Refusal(f"no such file ({path}). Fix: name a manifest, or a folder of them")
    return [path]


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file; a document that is no Kubernetes object is passed over, as Helm's values and `plan.json` are."""
    try:
        documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refusal(
            f"not YAML in UTF-8: {' '.join(str(error).split())} ({file}). Fix: give plain manifests"
        ) from None
    for document in documents:
        if isinstance(document, dict) and "kind" in document and "apiVersion" in document:
            manifest = cast(dict[str, Any], document)
            _refuse_malformed(manifest, file)
            yield manifest


def _refuse_malformed(manifest: dict[str, Any], file: Path) -> None:
    """Pods without readable containers would pass every rule."""
    if kind_of(manifest) not in (*POD_KINDS, "Pod", "CronJob"):
        return
    found = pod_spec(manifest).get("containers")
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in cast(list[Any], found)):
        said = "missing" if found is None else "empty" if found in ([], {}, "") else "no list of containers"
        raise Refusal(
            f"{name_of(manifest)}: containers: {said} ({file}). Fix: a list of containers, each with a name and an image"
        )
