"""What an image's archive holds, as `docker save` lays it out: digest, layers, files.

https://github.com/opencontainers/image-spec/blob/v1.1.0/config.md: the configuration names every layer by the digest of what is in
it, unpacked, so that its own digest is the image's, however layers are compressed.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contents:
    digest: str
    """`sha256:…` of the configuration."""
    layers: tuple[str, ...]
    """`sha256:…` of each layer, undermost first."""
    config: Json
    """What runs, as whom, with which environment."""


def read(archive: Path) -> Contents:
    """Of an archive with one image."""
    with tarfile.open(archive) as image:
        raw = _bytes(image, _manifest(image)["Config"])
    config = json.loads(raw)
    return Contents(
        digest=f"sha256:{hashlib.sha256(raw).hexdigest()}",
        layers=tuple(config["rootfs"]["diff_ids"]),
        config=config["config"],
    )


def files(archive: Path) -> Iterator[tarfile.TarInfo]:
    """Everything in every layer, undermost first."""
    with tarfile.open(archive) as image:
        for name in _manifest(image)["Layers"]:
            with tarfile.open(fileobj=image.extractfile(name)) as layer:
                yield from layer


def text_of(archive: Path, path: str) -> str:
    """A file of the image, `etc/passwd`. Raises KeyError where there is none."""
    with tarfile.open(archive) as image:
        for name in reversed(_manifest(image)["Layers"]):
            with tarfile.open(fileobj=image.extractfile(name)) as layer:
                if path in layer.getnames():
                    return _bytes(layer, path).decode()
    raise KeyError(path)


def _manifest(image: tarfile.TarFile) -> Json:
    (one,) = json.loads(_bytes(image, "manifest.json"))
    return one


def _bytes(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a folder"
    return file.read()
