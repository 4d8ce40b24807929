"""What the pods of a workload get of ConfigMaps and Secrets: of the manifests', else, for Secrets, of the user's own."""

import base64
from dataclasses import dataclass
from pathlib import Path

from infra.local.objects import Json, ManifestError, Manifests, Workload, entries, section
from infra.local.secrets import Secrets


@dataclass(frozen=True)
class Sources:
    """Raises ManifestError for what is asked for and not there."""

    manifests: Manifests
    secrets: Secrets | None
    workload: Workload

    def files(self, kind: str, reference: Json) -> dict[str, str | Path]:
        """Of a volume: path in it → text, or the file of the user's that it links to."""
        own = self._own(kind, reference)
        found: dict[str, Path] | dict[str, str] = self._declared(kind, reference) if own is None else own
        items = {i["key"]: i["path"] for i in entries(reference, "items")} or {key: key for key in found}
        return {path: found[key] for key, path in items.items() if key in found}

    def data(self, kind: str, reference: Json) -> dict[str, str]:
        """Values by key."""
        own = self._own(kind, reference)
        if own is not None:
            return {key: file.read_text(encoding="utf-8") for key, file in own.items()}
        return self._declared(kind, reference)

    def _declared(self, kind: str, reference: Json) -> dict[str, str]:
        """Values that the manifests hold, by key."""
        name: str = reference["name"]
        manifest = self.manifests.find(kind, namespace=self.workload.namespace, name=name)
        if manifest is None:
            if reference.get("optional"):
                return {}
            raise ManifestError(f"no {kind} {name!r} ({self.workload.key}). Add it to the manifests")
        encoded: dict[str, str] = {**section(manifest, "binaryData"), **section(manifest, "data")}
        if kind == "Secret":
            encoded = {k: base64.b64decode(v).decode() for k, v in encoded.items()}
        return encoded | section(manifest, "stringData")

    def key(self, kind: str, reference: Json) -> str | None:
        """One value; None where it may be missing and is."""
        data = self.data(kind, reference)
        if reference["key"] not in data and not reference.get("optional"):
            where = f"{kind} {reference['name']!r}, {self.workload.key}"
            raise ManifestError(f"no key {reference['key']!r} ({where}). Add it to the {kind}")
        return data.get(reference["key"])

    def _own(self, kind: str, reference: Json) -> dict[str, Path] | None:
        """Files of a Secret that the user keeps, by key; None for all else."""
        name: str = reference["name"]
        in_set = self.manifests.find(kind, namespace=self.workload.namespace, name=name)
        if kind != "Secret" or in_set or self.secrets is None:
            return None
        asked = [i["key"] for i in entries(reference, "items")] or ([reference["key"]] if "key" in reference else [])
        there = self.secrets.keys(name)
        keys = [key for key in asked or there if not reference.get("optional") or key in there]
        if not keys and not reference.get("optional"):
            raise self.secrets.missing(name, user=self.workload.key)
        return {key: self.secrets.file(name, key, user=self.workload.key) for key in keys}
