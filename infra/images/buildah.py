"""buildah, unpacked and not installed, on a store of its own in the cache; and a base image where none can be pulled.

Its layers stay in the store, so that a change of code builds the last layers only.
"""

import subprocess
from pathlib import Path

from infra.clouds.local import ClusterError, Places, debian
from infra.clouds.local.debian import Say
from infra.clouds.local.making import tied
from infra.clouds.local.places import digest_of
from infra.clouds.local.shell import run

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-pip", "python3-venv")
# What lets a build reach package indexes as this machine does; no layer holds it.
OF_MACHINE = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
IN_NAMESPACE = 'mount --bind "$0" /etc/ld.so.cache && exec "$@"'
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'


class Buildah:
    def __init__(self, places: Places, say: Say) -> None:
        self.programs = debian.programs(places.cache, debian.IMAGE_PROGRAMS, say=say)
        self.folder, self.say = places.cache / "images", say
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "policy.json").write_text(POLICY)
        (self.folder / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n')

    def bootstrapped(self, *, epoch: str) -> str:
        """Reference of a base image of Debian's packages, made here."""
        reference = f"localhost/slipway-base:{digest_of([SUITE.encode(), *map(str.encode, PACKAGES)])}"
        if self.has(reference):
            return reference
        self.say(f"making a base image of Debian's {', '.join(PACKAGES)}")
        tree = self.folder / "base.tar"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(tree)]
        done = run(*tied(*command), env=self.programs.env | {"SOURCE_DATE_EPOCH": epoch})
        if done.returncode:
            raise ClusterError(f"mmdebstrap makes no base image: {done.stderr.strip()[-400:]}")
        dockerfile = self.folder / "base.Dockerfile"
        dockerfile.write_text("FROM scratch\nADD base.tar /\n")
        made = self.do("build", "--timestamp", epoch, "-f", str(dockerfile), "-t", reference, str(self.folder))
        tree.unlink()
        if made.returncode:
            raise ClusterError(f"buildah makes no base image: {made.stderr.strip()[-400:]}")
        return reference

    def has(self, reference: str) -> bool:
        """Whether the store has an image of that name."""
        return bool(self.do("images", "--quiet", reference).stdout.strip())

    def do(self, verb: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """buildah, in a mount namespace of its own: it leaves no mount behind, and finds its libraries wherever it runs itself."""
        storage = [
            *("--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")),
            *("--storage-driver", "overlay", "--registries-conf", str(self.folder / "registries.conf")),
        ]
        flags = ["--signature-policy", str(self.folder / "policy.json")] if verb in ("build", "push") else []
        if verb == "build":
            flags += ["--isolation", "chroot", "--network", "host", "--layers", "--quiet"]
            for path in OF_MACHINE:
                flags += ["--volume", f"{path}:{path}:ro"] if Path(path).exists() else []
        buildah = ["buildah", *storage, verb, *flags, *words]
        command = ["unshare", "--mount", "sh", "-c", IN_NAMESPACE, self.libraries(), *buildah]
        return run(*tied(*command), env=self.programs.env)

    def libraries(self) -> Path:
        """A loader's cache that knows the unpacked libraries too: buildah starts itself again without its environment."""
        cache = self.folder / "ld.so.cache"
        folders = sorted(self.programs.root.glob("usr/lib/*-linux-gnu"))
        run("ldconfig", "-X", "-C", cache, *folders, env=self.programs.env)
        return cache
