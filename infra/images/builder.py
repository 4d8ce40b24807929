"""Build an image from its Dockerfile: by docker buildx where Docker is, by buildah where it is not.

Without Docker the base image need not be pulled: `BOOTSTRAP` makes one of Debian's packages. buildah's layers stay in the cache,
so that a change of code builds the last layers only.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.clouds.local import ClusterError, Places, debian
from infra.clouds.local.debian import Say
from infra.clouds.local.places import digest_of
from infra.clouds.local.shell import run

BOOTSTRAP = "bootstrap"
SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-pip", "python3-venv")
EPOCH = "0"
"""Time of every file of an image: what is in it decides its digest, and not when it was built."""
# What lets a build reach package indexes as this machine does.
OF_MACHINE = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
IN_NAMESPACE = 'mount --bind "$0" /etc/ld.so.cache && exec "$@"'
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    reference: str
    """Name and tag, as pods have it."""
    dockerfile: Path
    context: Path
    base: str
    """Reference of the base image, or `BOOTSTRAP`."""
    arguments: Mapping[str, str] = field(default_factory=dict[str, str])


def build(recipe: Recipe, out: Path, *, places: Places, say: Say) -> str:
    """Build the image into the archive `out`. Returns its digest. Raises `Unable`, `ClusterError`."""
    say(f"building {recipe.reference}")
    if _has_docker():
        return _by_docker(recipe, out)
    return _Buildah(places, say).build(recipe, out)


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


def _by_docker(recipe: Recipe, out: Path) -> str:
    if recipe.base == BOOTSTRAP:
        raise ClusterError("Docker is here, so a base image can be pulled. Fix: --base with a reference")
    command = ["docker", "buildx", "build", "--sbom=false", "--provenance=false", "--file", str(recipe.dockerfile)]
    command += ["--output", f"type=docker,dest={out},name={full_name(recipe.reference)},rewrite-timestamp=true"]
    for name, value in {"BASE": recipe.base, "SOURCE_DATE_EPOCH": EPOCH, **recipe.arguments}.items():
        command += ["--build-arg", f"{name}={value}"]
    _must(run(*command, recipe.context), recipe)
    return digest_of([out.read_bytes()])


class _Buildah:
    def __init__(self, places: Places, say: Say) -> None:
        self.programs = debian.programs(places.cache, debian.IMAGE_PROGRAMS, say=say)
        self.folder, self.say = places.cache / "images", say
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "policy.json").write_text(POLICY)
        (self.folder / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n')

    def build(self, recipe: Recipe, out: Path) -> str:
        base = self.bootstrapped() if recipe.base == BOOTSTRAP else recipe.base
        command = ["build", "--isolation", "chroot", "--network", "host", "--layers", "--timestamp", EPOCH, "--quiet"]
        command += ["--pull-never"] if recipe.base == BOOTSTRAP else []
        for path in OF_MACHINE:
            command += ["--volume", f"{path}:{path}:ro"] if Path(path).exists() else []
        for name, value in {"BASE": base, **recipe.arguments}.items():
            command += ["--build-arg", f"{name}={value}"]
        command += ["--file", str(recipe.dockerfile), "--tag", full_name(recipe.reference), str(recipe.context)]
        _must(self.do(*command), recipe)
        out.unlink(missing_ok=True)
        _must(
            self.do("push", full_name(recipe.reference), f"docker-archive:{out}:{full_name(recipe.reference)}"), recipe
        )
        return _must(self.do("images", "--quiet", "--no-trunc", full_name(recipe.reference)), recipe)

    def bootstrapped(self) -> str:
        """A base image of Debian's packages, made here."""
        reference = f"localhost/slipway-base:{digest_of([SUITE.encode(), *map(str.encode, PACKAGES)])}"
        if self.do("images", "--quiet", reference).stdout.strip():
            return reference
        self.say(f"making a base image of Debian's {', '.join(PACKAGES)}")
        tree = self.folder / "base.tar"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(tree)]
        done = run(*command, env=self.programs.env | {"SOURCE_DATE_EPOCH": EPOCH})
        if done.returncode:
            raise ClusterError(f"mmdebstrap makes no base image: {done.stderr.strip()[-400:]}")
        dockerfile = self.folder / "base.Dockerfile"
        dockerfile.write_text("FROM scratch\nADD base.tar /\n")
        made = self.do(
            "build", "--quiet", "--timestamp", EPOCH, "-f", str(dockerfile), "-t", reference, str(self.folder)
        )
        tree.unlink()
        if made.returncode:
            raise ClusterError(f"buildah makes no base image: {made.stderr.strip()[-400:]}")
        return reference

    def do(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """buildah, in a mount namespace of its own: it leaves no mount behind, and finds its libraries wherever it runs itself."""
        storage = [
            *("--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")),
            *("--storage-driver", "overlay", "--registries-conf", str(self.folder / "registries.conf")),
        ]
        verb, *rest = words
        policy = ["--signature-policy", str(self.folder / "policy.json")] if verb in ("build", "push") else []
        buildah = ["buildah", *storage, verb, *policy, *rest]
        return run(
            "unshare", "--mount", "sh", "-c", IN_NAMESPACE, str(self.libraries()), *buildah, env=self.programs.env
        )

    def libraries(self) -> Path:
        """A loader's cache that knows the unpacked libraries too: buildah starts itself again without its environment."""
        cache = self.folder / "ld.so.cache"
        folders = sorted(self.programs.root.glob("usr/lib/*-linux-gnu"))
        run("ldconfig", "-X", "-C", cache, *folders, env=self.programs.env)
        return cache


def _must(done: "subprocess.CompletedProcess[str]", recipe: Recipe) -> str:
    if done.returncode:
        raise ClusterError(f"{recipe.reference} cannot be built: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout.strip()
