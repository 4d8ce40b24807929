"""The same cluster by kind, where Docker is: https://kind.sigs.k8s.io. It brings names, volumes and network policies along."""

import shutil
import subprocess
from pathlib import Path

from infra.clouds.local import golang
from infra.clouds.local.debian import Say
from infra.clouds.local.places import ClusterError
from infra.clouds.local.shell import run

NAME = "slipway"
OURS = ("--name", NAME)


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
    kubeconfig.parent.mkdir(parents=True, exist_ok=True)
    if is_up():
        # Its node knows no kubeconfig while it is being made: one that a killed `up` left is made again.
        if _kind(cache, "export", "kubeconfig", *OURS, "--kubeconfig", str(kubeconfig)).returncode == 0:
            say("kind's cluster runs already")
            return
        say("kind's cluster is not whole")
        down(cache)
    say("kind makes a cluster in Docker")
    _must(_kind(cache, "create", "cluster", *OURS, "--kubeconfig", str(kubeconfig), "--wait", "120s"))


def down(cache: Path) -> None:
    _must(_kind(cache, "delete", "cluster", *OURS))


def load(archive: Path, *, cache: Path) -> None:
    _must(_kind(cache, "load", "image-archive", str(archive), *OURS))


def _kind(cache: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """The user's kind, else one that is built as Kubernetes is elsewhere."""
    program = shutil.which("kind") or golang.build(cache, ["kind"], say=lambda _: None).program("kind")
    return run(program, *words)


def _must(done: "subprocess.CompletedProcess[str]") -> None:
    if done.returncode:
        raise ClusterError(f"kind: {done.stderr.strip()[-400:]}")
