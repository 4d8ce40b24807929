"""Builders of small manifests."""

from typing import Any

Json = dict[str, Any]


def container(*command: str, name: str = "main", ports: dict[str, int] | None = None, **rest: Any) -> Json:
    listed = [{"name": n, "containerPort": p} for n, p in (ports or {}).items()]
    return {"name": name, "command": list(command), "ports": listed, **rest}


def template(*containers: Json, labels: dict[str, str] | None = None, **spec: Any) -> Json:
    return {"metadata": {"labels": labels or {}}, "spec": {"containers": list(containers), **spec}}


def _object(kind: str, name: str, **rest: Any) -> Json:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "team"}, **rest}


def job(name: str, *containers: Json, spec: Json | None = None, **pod: Any) -> Json:
    pod = {"restartPolicy": "Never", **pod}
    return _object("Job", name, spec={"template": template(*containers, **pod), **(spec or {})})


def deployment(name: str, *containers: Json, spec: Json | None = None, **pod: Any) -> Json:
    return _object(
        "Deployment",
        name,
        spec={"template": template(*containers, labels={"app": name}, **pod), **(spec or {})},
    )


def service(name: str, *, app: str | None = None, ports: list[Json], selector: Json | None = None, **spec: Any) -> Json:
    return _object("Service", name, spec={"selector": selector or {"app": app or name}, "ports": ports, **spec})


def config_map(name: str, **data: str) -> Json:
    return _object("ConfigMap", name, data=data)
