"""The node of this machine from outside: its processes, and the disks of its volumes. Kind's are Docker's."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.apply import Cluster
from infra.clouds.local import Places, kind, machine
from infra.clouds.local.volumes import FOLDER


def needed() -> None:
    """Skip where the cluster is none of this machine's own."""
    if kind.is_possible():
        pytest.skip("the node is kind's: its processes and disks are Docker's")


def kill_process(program: str) -> None:
    """kill -9 of a process of the node, and of no other that is called so."""
    node = str(Places.of_user().cache).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            first = (folder / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if first.startswith(node) and first.endswith(f"/{program}".encode()):
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError(f"no {program} of the node runs")


@dataclass(frozen=True)
class Disk:
    """A small disk that lies over a claim's folder, and hides what is in that."""

    over: Path
    """What pods see that start from now on."""
    under: Path
    """What they saw before."""

    @property
    def _filler(self) -> Path:
        return self.over / "filler"

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                return

    def free(self) -> None:
        self._filler.unlink()


@contextmanager
def small_disk(cluster: Cluster, *, namespace: str, claim: str, size_mib: int) -> Iterator[Disk]:
    """An empty disk in the place of a claim's volume, for pods that start within the block."""
    path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{claim}"
    folder = FOLDER / cluster.get(path)["spec"]["volumeName"]
    places = Places.of_user()
    pid = machine.node_pid(places)
    assert pid, "no node runs"
    inside = ["nsenter", "--target", str(pid), "--mount", "--pid"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0777", "disk", folder], check=True)
    try:
        # The machine does not see what is mounted in the node.
        under = places.library / folder.relative_to("/var/lib")
        yield Disk(over=Path(f"/proc/{pid}/root{folder}"), under=under)
    finally:
        subprocess.run([*inside, "umount", "--lazy", folder], check=True)
