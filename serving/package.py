"""Where a model comes from: a directory, a registry entry or a channel, resolved to verified files on this machine.

The registry's layout (docs/contracts.md): `models/<name>/<sha256>/` holds a package and `manifest.json`, whose own
digest is the directory's name; `models/<name>/channels/<channel>.json` points at one of them.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import Refused

DIGEST = re.compile(r"[0-9a-f]{64}")
CHANNEL = re.compile(r"(?P<model>.*/(?P<name>[^/]+))/channels/(?P<channel>[^/]+)\.json")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Package:
    """One package in one place. `digest` is the registry's, or None for a directory that has none."""

    url: str
    name: str
    digest: str | None


@dataclass(frozen=True)
class Channel:
    """A channel file, which names the digest to serve, now and later."""

    url: str
    model_url: str
    name: str

    def read(self) -> Package | None:
        """The package that the channel points at, or None while there is no such file.

        Raises `Refused` when the file is no channel. A channel is replaced by a rename, so what is read is whole.
        """
        try:
            text = _read_bytes(self.url)
        except FileNotFoundError:
            return None
        try:
            digest = json.loads(text)["digest"]
        except (ValueError, KeyError, TypeError, RecursionError):
            digest = None
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise Refused("the channel holds no digest", where=self.url, fix='It must read {"digest": "<sha256>", …}')
        return Package(url=f"{self.model_url}/{digest}", name=self.name, digest=digest)


def resolve(model: str, *, holds: str = "config.json") -> Package | Channel:
    """What MODEL names. A directory is looked at here, so that a typing mistake is refused before anything starts.

    `holds` is the file that tells a package of its kind.
    """
    url = model.rstrip("/")
    if match := CHANNEL.fullmatch(url if "://" in url else os.path.abspath(url)):
        return Channel(url=match[0], model_url=match["model"], name=match["name"])
    if "://" not in url:
        url = os.path.abspath(url)
        if not os.path.isdir(url):
            fix = "Give a package directory, a Hugging Face directory, or …/channels/<channel>.json"
            raise Refused("there is no such model directory", where=model, fix=fix)
        if not os.path.isfile(f"{url}/{holds}"):
            raise Refused(f"{holds} is missing", where=url, fix="Give the directory that holds it")
    parent, _, last = url.rpartition("/")
    if DIGEST.fullmatch(last):
        return Package(url=url, name=parent.rpartition("/")[2], digest=last)
    return Package(url=url, name=last, digest=None)


def fetch(package: Package, *, on_bytes: Callable[[int, int], None]) -> Path:
    """The package as a local directory whose every file has the sha256 that its manifest says.

    A remote one is copied to the cache first (`XDG_CACHE_HOME`, whole or not at all). A directory without a manifest
    has nothing to be checked against. `on_bytes(done, total)` tells progress. Raises `Refused`, naming the file.
    """
    if "://" not in package.url:
        root = Path(package.url)
        if package.digest is not None or (root / "manifest.json").is_file():
            _verify(root, _manifest(package), on_bytes=on_bytes)
        return root
    return _download(package, on_bytes=on_bytes)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The content address of a manifest: sha256 of its canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(package: Package) -> dict[str, dict[str, Any]]:
    """The `files` of a package's manifest, once the manifest is known to be the one that the digest names."""
    where = f"{package.url}/manifest.json"
    try:
        manifest = json.loads(_read_bytes(where))
        files = {path: {"sha256": str(f["sha256"]), "bytes": int(f["bytes"])} for path, f in manifest["files"].items()}
    except FileNotFoundError:
        raise Refused("there is no manifest", where=where, fix="Publish the package, or serve its directory") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused("the manifest cannot be read", where=where, fix="Publish the package again") from None
    if package.digest is not None and manifest_digest(manifest) != package.digest:
        what = f"the manifest's digest is {manifest_digest(manifest)}, not {package.digest}"
        raise Refused(what, where=where, fix="The package was changed after it was published; publish it again")
    for path in files:
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(f"the manifest names '{path}', outside the package", where=where, fix="Publish it again")
    return files


def _verify(root: Path, files: dict[str, dict[str, Any]], *, on_bytes: Callable[[int, int], None]) -> None:
    total_bytes = sum(f["bytes"] for f in files.values())
    done_bytes = 0
    for path, expected in sorted(files.items()):
        digest = hashlib.sha256()
        try:
            with open(root / path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done_bytes += len(chunk)
                    on_bytes(done_bytes, total_bytes)
        except FileNotFoundError:
            raise Refused("a file of the package is missing", where=str(root / path), fix="Publish it again") from None
        if digest.hexdigest() != expected["sha256"]:
            what = f"sha256 is {digest.hexdigest()}, the manifest says {expected['sha256']}"
            fix = "The file is damaged or was tampered with; publish the package again"
            raise Refused(what, where=str(root / path), fix=fix)


def _download(package: Package, *, on_bytes: Callable[[int, int], None]) -> Path:
    """Copies a remote package to the cache, beside its place first, and renames it once it is whole and verified."""
    if package.digest is None:
        fix = "Give …/models/<name>/<sha256>, a channel, or a local directory"
        raise Refused("a remote model must be a registry entry", where=package.url, fix=fix)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipway" / "models"
    target = cache / package.digest
    files = _manifest(package)
    if target.is_dir():
        _verify(target, files, on_bytes=on_bytes)
        return target
    cache.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=cache, prefix=".fetch-"))
    try:
        for path in files:
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            with _open(f"{package.url}/{path}") as source, open(beside / path, "wb") as copy:
                shutil.copyfileobj(source, copy, CHUNK_BYTES)
        _verify(beside, files, on_bytes=on_bytes)
        try:
            beside.rename(target)
        except OSError:  # another process fetched the same digest first, and content addresses make that the same
            if not target.is_dir():
                raise
        return target
    except FileNotFoundError as error:
        raise Refused("a file of the package is missing", where=str(error), fix="Publish it again") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _open(url: str) -> Any:
    if "://" not in url:
        return open(url, "rb")
    import fsspec  # costs memory that a server of local files need not pay

    return fsspec.open(url, "rb").open()  # pyright: ignore[reportAttributeAccessIssue]


def _read_bytes(url: str) -> bytes:
    with _open(url) as file:
        return file.read()
