"""Folders of the cache that are made once: whole or absent, by one process at a time, and with all that worked on it gone after."""

import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from infra.clouds.local.places import ClusterError
from infra.local.locks import held

WAIT_S = 3600.0
"""For another process that makes the same."""


@contextmanager
def making(folder: Path) -> Generator[Path | None]:
    """A folder to make `folder` in, which becomes it at the end; None where it is there already. Raises `ClusterError`.

    What a killed process left is removed, and who comes while another is at work waits for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    with held(folder.with_name(f".{folder.name}.lock"), wait_s=WAIT_S) as ours:
        if not ours:
            raise ClusterError(f"another process has been making {folder} for an hour. Fix: end it")
        try:
            if folder.exists():
                yield None
                return
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def tied(*command: str | Path) -> list[str | Path]:
    """`command`, so that it and all that it starts end with this process, however that ends; where root can see to it."""
    tools = [shutil.which(name) for name in ("setpriv", "unshare")]
    if sys.platform != "linux" or os.geteuid() != 0 or None in tools:
        return [*command]
    # The first process of a namespace of processes takes all others along.
    namespace = ["--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *namespace, "--", *command]
