"""A container image of one static program, as an OCI archive: the same bytes for the same program.

https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
USER = 65532
"""Nobody: what runs in the image has no rights."""
MEDIA = "application/vnd.oci.image"


def write(out: Path, *, reference: str, program: Path, command: Sequence[str] = ()) -> None:
    """Write the image `reference` to `out`: `program` at /bin/NAME; runs `command`, else itself."""
    inside = f"bin/{program.name}"
    # Not compressed: it goes no further than to the node, which would only unpack it again.
    layer = _layer(program, inside)
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": list(command or [f"/{inside}"]), "Env": ["PATH=/bin"], "User": f"{USER}:{USER}"},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{MEDIA}.manifest.v1+json",
            "config": _descriptor(config, f"{MEDIA}.config.v1+json"),
            "layers": [_descriptor(layer, f"{MEDIA}.layer.v1.tar")],
        }
    )
    named = _descriptor(manifest, f"{MEDIA}.manifest.v1+json") | {
        "annotations": {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference}
    }
    with tarfile.open(out, "w") as archive:
        _add(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        for blob in (layer, config, manifest):
            _add(archive, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
        _add(archive, "index.json", _json({"schemaVersion": 2, "manifests": [named]}))


def _layer(program: Path, inside: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as layer:
        for folder in ("bin", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            layer.addfile(entry)
        _add(layer, inside, program.read_bytes(), mode=0o755)
    return packed.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _descriptor(blob: bytes, media: str) -> Json:
    return {"mediaType": media, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(document: Json) -> bytes:
    return json.dumps(document, sort_keys=True).encode()
