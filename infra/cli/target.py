"""Where a stack runs: as processes of this machine while `slipway local up` has it, else on the cluster of a kubeconfig."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from infra.apply import ApiError, Cluster
from infra.cli.local import state_dir
from infra.cli.project import me, people
from infra.clouds.local import Places
from infra.local import client


def local_state(stack: str, kubeconfig: Path | None) -> Path | None:
    """The state directory of a stack that runs here; None where it does not, or a cluster was named."""
    folder = state_dir(stack)
    return folder if kubeconfig is None and client.status(folder).running else None


def cluster_of(kubeconfig: Path | None) -> Cluster:
    """The cluster that was named, else that of `slipway cluster up`, else of ~/.kube/config. Raises `ApiError`."""
    own = Places.of_user().kubeconfig
    return Cluster(kubeconfig or (own if own.exists() else None))


@contextmanager
def told(stack: str, namespace: str) -> Generator[None]:
    """What the API server refuses is one line, with exit code 1."""
    try:
        yield
    except (ApiError, client.LocalError) as error:
        text = str(error)
        if isinstance(error, ApiError) and error.status == 404:
            text = (
                f"{stack} is not on this cluster (no namespace {namespace}). Fix: {me()} apply -s {stack}, or local up"
            )
        elif isinstance(error, ApiError) and error.status == 403:
            text = f"{text}. Fix: ask for the right to read namespace {namespace}"
        people.print(f"[bold red]error:[/] {escape(text)}")
        sys.exit(1)
