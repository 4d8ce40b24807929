"""Build an image from its Dockerfile: by docker buildx where Docker is, by buildah where it is not.

Either way the files' times are fixed, so that the same content has the same digest wherever and whenever it is built.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.clouds.local import ClusterError, Places
from infra.clouds.local.debian import Say
from infra.clouds.local.places import digest_of
from infra.clouds.local.shell import run
from infra.images import contents
from infra.images.buildah import Buildah

BOOTSTRAP = "bootstrap"
"""Base image that is made here, of Debian's packages, where none can be pulled."""
EPOCH = "0"
"""Time of every file of an image: what is in it decides its digest, and not when it was built."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    reference: str
    """Name and tag, as pods have it."""
    content: str
    """Digest of the Dockerfile and of what it copies from the context and the folders besides."""
    dockerfile: Path
    context: Path
    base: str
    """Reference of the base image, or `BOOTSTRAP`."""
    contexts: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Folders besides, by the name that the Dockerfile copies from."""
    arguments: Mapping[str, str] = field(default_factory=dict[str, str])


def build(recipe: Recipe, out: Path, *, places: Places, say: Say) -> str:
    """Build the image into the archive `out`. Returns its digest. Raises `Unable`, `ClusterError`."""
    say(f"building {recipe.reference}")
    out.unlink(missing_ok=True)
    if _has_docker():
        _by_docker(recipe, out)
    else:
        _by_buildah(recipe, out, Buildah(places, say))
    return contents.read(out).digest


def full_name(reference: str) -> str:
    """As container runtimes complete a short name: the one that an archive must have, to be found."""
    first, slash, _ = reference.partition("/")
    if not slash:
        return f"docker.io/library/{reference}"
    return reference if "." in first or ":" in first or first == "localhost" else f"docker.io/{reference}"


def _has_docker() -> bool:
    return (
        bool(shutil.which("docker"))
        and run("docker", "buildx", "ls").returncode == 0 == run("docker", "info").returncode
    )


def _by_docker(recipe: Recipe, out: Path) -> None:
    """https://docs.docker.com/reference/cli/docker/buildx/build/"""
    if recipe.base == BOOTSTRAP:
        raise ClusterError("Docker is here, so a base image can be pulled. Fix: --base with a reference")
    command = ["docker", "buildx", "build", "--sbom=false", "--provenance=false"]
    output = f"type=docker,dest={out},name={full_name(recipe.reference)},rewrite-timestamp=true"
    command += ["--output", output, *_asked(recipe, base=recipe.base, SOURCE_DATE_EPOCH=EPOCH)]
    _must(run(*command), recipe)


def _by_buildah(recipe: Recipe, out: Path, buildah: Buildah) -> None:
    """https://github.com/containers/buildah/blob/main/docs/buildah-build.1.md"""
    bootstrap = recipe.base == BOOTSTRAP
    base = buildah.bootstrapped(epoch=EPOCH) if bootstrap else recipe.base
    # What goes in names what is kept in the store: asked for the same again, not even the layers are compared, for which
    # buildah reads all that they copy.
    what = [recipe.content, base, EPOCH, *(f"{name}={value}" for name, value in sorted(recipe.arguments.items()))]
    kept = f"localhost/slipway-{recipe.name}:{digest_of(map(str.encode, what))}"
    if not buildah.has(kept):
        command = ["build", *(["--pull-never"] if bootstrap else []), "--timestamp", EPOCH, "--tag", kept]
        _must(buildah.do(*command, *_asked(recipe, base=base)), recipe)
    _must(buildah.do("push", kept, f"docker-archive:{out}:{full_name(recipe.reference)}"), recipe)


def _asked(recipe: Recipe, *, base: str, **besides: str) -> list[str]:
    """What both builders are asked in the same words."""
    words = [f"--build-context={name}={folder}" for name, folder in recipe.contexts.items()]
    words += [f"--build-arg={name}={value}" for name, value in {"BASE": base, **besides, **recipe.arguments}.items()]
    return [*words, "--file", str(recipe.dockerfile), str(recipe.context)]


def _must(done: "subprocess.CompletedProcess[str]", recipe: Recipe) -> None:
    if done.returncode:
        raise ClusterError(f"{recipe.reference} cannot be built: {(done.stderr or done.stdout).strip()[-1500:]}")
