"""The same cluster by kind, where Docker is: https://kind.sigs.k8s.io. It brings names, volumes and network policies along."""

import shutil
import subprocess
from pathlib import Path

from infra.clouds.local import golang
from infra.clouds.local.debian import Say
from infra.clouds.local.places import ClusterError
from infra.clouds.local.shell import run

NAME = "slipway"


def is_possible() -> bool:
    """Whether a Docker engine answers here."""
    if not shutil.which("docker"):
        return False
    return run("docker", "info").returncode == 0


def is_up() -> bool:
    """Whether kind's cluster of ours is there: asked of Docker, so that a question builds no program."""
    label = f"label=io.x-k8s.kind.cluster={NAME}"
    return is_possible() and bool(run("docker", "ps", "--all", "--quiet", "--filter", label).stdout.strip())


def up(kubeconfig: Path, *, cache: Path, say: Say) -> None:
    """Have the cluster, and its kubeconfig in `kubeconfig`. Raises `ClusterError`."""
    if is_up():
        say("kind's cluster runs already")
        return
    say("kind makes a cluster in Docker")
    kubeconfig.parent.mkdir(parents=True, exist_ok=True)
    _must(_kind(cache, "create", "cluster", "--name", NAME, "--kubeconfig", str(kubeconfig), "--wait", "120s"))


def down(cache: Path) -> None:
    _must(_kind(cache, "delete", "cluster", "--name", NAME))


def load(archive: Path, *, cache: Path) -> None:
    _must(_kind(cache, "load", "image-archive", str(archive), "--name", NAME))


def _kind(cache: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """The user's kind, else one that is built as Kubernetes is elsewhere."""
    program = shutil.which("kind") or golang.build(cache, ["kind"], say=lambda _: None).program("kind")
    return run(program, *words)


def _must(done: "subprocess.CompletedProcess[str]") -> None:
    if done.returncode:
        raise ClusterError(f"kind: {done.stderr.strip()[-400:]}")
