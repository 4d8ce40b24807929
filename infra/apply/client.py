"""A Kubernetes API server, by plain paths and JSON: the few verbs that applying needs, for objects of any kind."""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from yaml import YAMLError

Json = dict[str, Any]
MANAGER = "slipway"
"""Field manager of server-side apply: whose fields are whose."""
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"


class ApiError(Exception):
    """The API server refused, or did not answer (`status` 0)."""

    def __init__(self, message: str, *, status: int, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Cluster:
    """The cluster of a kubeconfig. Raises `ApiError` from every method."""

    def __init__(self, kubeconfig: Path | None = None) -> None:
        """`kubeconfig`, else KUBECONFIG, else ~/.kube/config; tokens by whatever its `exec` says, as for kubectl."""
        from kubernetes import config  # half a second of start-up that only live clusters need
        from kubernetes.config import ConfigException

        try:
            self._api: Any = cast(Any, config).new_client_from_config(str(kubeconfig) if kubeconfig else None)
        except (ConfigException, OSError, ValueError, YAMLError) as error:
            where = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise ApiError(
                f"no cluster in {where} ({why}). Fix: --kubeconfig, or slipway cluster up", status=0
            ) from None
        self._api.configuration.retries = 0
        self._kinds = cache(self._discover)

    def get(self, path: str, **query: str) -> Json:
        return self.request("GET", path, query=query)

    def patch(self, path: str, body: Json) -> Json:
        return self.request("PATCH", path, body=body, content_type=MERGE)

    def apply(self, manifest: Json, *, dry_run: bool = False) -> Json:
        """Make the object so: server-side apply. Returns it as it is then (or would be)."""
        query = {"fieldManager": MANAGER, "force": "true"} | ({"dryRun": "All"} if dry_run else {})
        return self.request("PATCH", self.path(manifest), query=query, body=manifest, content_type=APPLY)

    def find(self, reference: Json) -> Json | None:
        """The object that `reference` (apiVersion, kind, metadata.name, .namespace) names, if it is there."""
        try:
            return self.get(self.path(reference))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def delete(self, reference: Json) -> bool:
        """Delete the object, and what it owns in the background. False when it was not there."""
        try:
            self.request("DELETE", self.path(reference), query={"propagationPolicy": "Background"})
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def knows(self, manifest: Json) -> bool:
        """Whether the cluster has the object's kind."""
        return manifest["kind"] in self._kinds(manifest["apiVersion"])

    def path(self, manifest: Json) -> str:
        """The object's path in the API."""
        version, kind = manifest["apiVersion"], manifest["kind"]
        try:
            plural, namespaced = self._kinds(version)[kind]
        except KeyError:
            raise ApiError(f"the cluster has no kind {kind} of {version}", status=404, reason="NoKind") from None
        metadata = manifest["metadata"]
        namespace = f"/namespaces/{metadata.get('namespace', 'default')}" if namespaced else ""
        return f"{_root(version)}{namespace}/{plural}/{metadata['name']}"

    def request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        return _document(self._send(method, path, query=query, body=body, content_type=content_type).data)

    def text(self, path: str, **query: str) -> str:
        """What a path says that is not JSON: a log."""
        return self._send("GET", path, query=query).data.decode(errors="replace")

    def lines(self, path: str, **query: str) -> Iterator[str]:
        """The same line by line, as they come."""
        answer, rest = self._send("GET", path, query=query, timeout_s=None), b""
        for chunk in answer.stream(1 << 16, decode_content=True):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest:
            yield rest.decode(errors="replace")

    @property
    def api(self) -> Any:
        """The `kubernetes` library's own client, for what it has and this has not: port-forwarding."""
        return self._api

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
        timeout_s: float | None = 60.0,
    ) -> Any:
        headers = {"Accept": "application/json, */*", "Content-Type": content_type}
        self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        url = f"{self._api.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        pool = self._api.rest_client.pool_manager
        try:
            answer = pool.request(
                method,
                url,
                headers=headers,
                body=data,
                timeout=timeout_s,
                retries=False,
                preload_content=timeout_s is not None,
            )
        except Exception as error:  # urllib3's many ways to say that nobody answers
            raise ApiError(f"{self._api.configuration.host} does not answer ({error})", status=0) from None
        if answer.status >= 300:
            document = _document(answer.data)
            raise ApiError(document.get("message", ""), status=answer.status, reason=document.get("reason", ""))
        return answer

    def _discover(self, version: str) -> dict[str, tuple[str, bool]]:
        """Kind → plural, whether it lives in a namespace. Empty for a group that is not there."""
        try:
            resources = self.get(_root(version))["resources"]
        except ApiError as error:
            if error.status == 404:
                return {}
            raise
        return {one["kind"]: (one["name"], one["namespaced"]) for one in resources if "/" not in one["name"]}


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _document(data: bytes) -> Json:
    try:
        found = json.loads(data)
    except ValueError:
        return {"message": data.decode(errors="replace").strip()[:300]}
    return cast(Json, found) if isinstance(found, dict) else {"message": str(found)}
