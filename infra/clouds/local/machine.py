"""The machine's side: the namespaces that the node runs in, the link into them, and leaving the machine as it was."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path

from infra.clouds.local import link
from infra.clouds.local.debian import Debian
from infra.clouds.local.places import INTERFACE, NETWORK, ClusterError, Places, Unable
from infra.clouds.local.settings import CGROUP, Process
from infra.clouds.local.shell import run

PLAN = "node.json"
SYSCTLS_KEPT = "sysctls.json"
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc")
CGROUPS = Path("/sys/fs/cgroup")
# What kubelet sets for the whole machine, since the kernel has no namespace for it.
SYSCTLS = (
    *("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
CAP_SYS_RESOURCE = 24
END_S = 30.0
LEAST_FREE_BYTES = 12 << 30
"""Its images and the stack's, packed and unpacked, and what is built once."""


def check() -> None:
    """Raises `Unable` where a node cannot be run."""
    if sys.platform != "linux":
        raise Unable("a node runs on Linux only. Fix: install Docker and kind, or give --kubeconfig")
    if os.geteuid() != 0:
        raise Unable(
            "root missing, which makes interfaces, mounts and cgroups. Fix: sudo, Docker and kind, or --kubeconfig"
        )
    for program in ("unshare", "mount"):
        if not shutil.which(program):
            raise Unable(f"{program} missing. Fix: apt-get install util-linux mount")
    _check_cgroups()
    if run("unshare", *NAMESPACES, "true").returncode:
        raise Unable("this machine lets root make no namespaces (unshare). Fix: Docker and kind, or --kubeconfig")
    mine = ip_network(NETWORK)
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        interface, destination, _, _, _, _, _, mask = line.split()[:8]
        taken = ip_network((bytes.fromhex(destination)[::-1], bin(int(mask, 16)).count("1")))
        if taken.prefixlen and taken.overlaps(mine) and interface != INTERFACE:
            raise Unable(f"{NETWORK} is in use (route {taken} by {interface}). Fix: Docker and kind, or --kubeconfig")


def check_room(places: Places) -> None:
    """Raises `Unable` where the disk is too full for a node with its images."""
    folder = next(one for one in (places.state, *places.state.parents) if one.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < LEAST_FREE_BYTES:
        wanted = f"{LEAST_FREE_BYTES >> 30} GiB for a node and its images"
        raise Unable(
            f"{free_bytes / 2**30:.1f} GiB free where {folder} is, of {wanted}. Fix: make room, or --kubeconfig"
        )


def _check_cgroups() -> None:
    """Raises `Unable` where the node could have none of its own."""
    for hierarchy in _hierarchies() if CGROUPS.exists() else [CGROUPS]:
        probe = hierarchy / f"{CGROUP}-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise Unable(
                f"cgroups cannot be made ({hierarchy}: {error.strerror}). Fix: a machine of your own, Docker and kind, or --kubeconfig"
            ) from None


def may_raise_oom_score() -> bool:
    """Whether this machine gives its root CAP_SYS_RESOURCE."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1)


def start(places: Places, debian: Debian, processes: Sequence[Process]) -> None:
    """Start the node in namespaces of its own, and link the machine to it. Raises `Unable`, `ClusterError`."""
    if there := other(places):
        raise Unable(
            f"a cluster runs on this machine already ({there}). Fix: `slipway cluster down` by whoever made it"
        )
    for folder in (places.shared, places.library, places.logs):
        folder.mkdir(parents=True, exist_ok=True)
    for hierarchy in _hierarchies():
        (hierarchy / CGROUP).mkdir(exist_ok=True)
    kept = {name: Path("/proc/sys", name).read_text() for name in SYSCTLS if Path("/proc/sys", name).exists()}
    _keep(places.state / SYSCTLS_KEPT, kept)
    plan = places.state / PLAN
    programs = [[process.name, process.command] for process in processes]
    environment = _environment(debian)
    plan.write_text(
        json.dumps(
            {
                "state": str(places.state),
                "cache": str(places.cache),
                "processes": programs,
                "environment": environment,
            }
        )
    )
    command = ["unshare", *NAMESPACES, sys.executable, "-m", "infra.clouds.local.node", str(plan)]
    with (places.logs / "node.log").open("ab") as log:
        outer = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
        )
    link.make(_inner(outer), debian)


def is_clean(places: Places) -> bool:
    """Whether nothing of a node is on this machine: no process, interface, cgroup, file or empty folder."""
    folder = places.state.parent
    if pids(places) or places.state.exists() or (folder.exists() and not any(folder.iterdir())):
        return False
    # Interface and cgroups have the same names for everybody: beside another user's node they are that one's.
    return other(places) is not None or not (link.is_there() or _cgroups())


def stop(places: Places) -> None:
    """End the node and restore the machine, whatever state both are in."""
    _kill(places)
    if other(places) is None:
        link.remove()
        for cgroup in _cgroups():
            _remove_cgroup(cgroup)
    kept = places.state / SYSCTLS_KEPT
    if kept.exists():
        for name, value in json.loads(kept.read_text()).items():
            Path("/proc/sys", name).write_text(value)
    _remove(places.state)
    with contextlib.suppress(OSError):
        places.state.parent.rmdir()


def pids(places: Places) -> list[int]:
    """Ids of the node's first process, and of what started it; by their command, so that no file can be out of date."""
    return [pid for pid, _ in _ours(places)]


def node_pid(places: Places) -> int | None:
    """Id of the node's first process, which is in its namespaces."""
    return next((pid for pid, words in _ours(places) if words[0] != b"unshare"), None)


def _kill(places: Places) -> None:
    """End the node's processes, and return when the last of them is gone: the kernel ends the first one after all others."""
    until = time.monotonic() + END_S
    while left := pids(places):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                _kill_one(pid, until)


def _kill_one(pid: int, until: float) -> None:
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not select.select([handle], [], [], max(0.0, until - time.monotonic()))[0]:
            raise ClusterError(f"process {pid} does not end. Fix: look why in /proc/{pid}/stack, then `down` again")
    finally:
        os.close(handle)


def _inner(outer: "subprocess.Popen[bytes]") -> int:
    """Id of the node's first process: the child that `unshare` forks."""
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    until = time.monotonic() + END_S
    while time.monotonic() < until and outer.poll() is None:
        if words := children.read_text().split():
            return int(words[0])
        time.sleep(0.02)
    raise ClusterError(
        "the node's namespaces cannot be made (unshare failed). Fix: a kernel with namespaces, or --kubeconfig"
    )


def _environment(debian: Debian) -> dict[str, str]:
    """What the node's processes are told: where programs are, and nothing of the user's."""
    wanted = {name: value for name, value in debian.env.items() if name in ("PATH", "LD_LIBRARY_PATH", "LANG")}
    return wanted | {"HOME": "/root", "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONUNBUFFERED": "1"}


def _keep(path: Path, values: dict[str, str]) -> None:
    """What was there before the first start stays what is restored."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values))
        part.rename(path)


def _remove(folder: Path) -> None:
    """Whole images lie in it: once through may take a minute. What is in use a moment longer goes the next time."""
    shutil.rmtree(folder, ignore_errors=True)
    until = time.monotonic() + END_S
    while folder.exists():
        if time.monotonic() > until:
            raise ClusterError(f"{folder} cannot be removed. Fix: `down` again")
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def _hierarchies() -> list[Path]:
    """Where cgroups are made: the one tree of cgroup v2, or each controller's of v1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return sorted(folder for folder in CGROUPS.iterdir() if (folder / "cgroup.procs").exists())


def _cgroups() -> list[Path]:
    """The node's own, that are there."""
    hierarchies = _hierarchies() if CGROUPS.exists() else []
    return [hierarchy / CGROUP for hierarchy in hierarchies if (hierarchy / CGROUP).exists()]


def _remove_cgroup(cgroup: Path) -> None:
    until = time.monotonic() + END_S
    while cgroup.exists():
        for folder, _, _ in os.walk(cgroup, topdown=False):
            # Busy while a process of it is on its way out.
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        if time.monotonic() > until:
            raise ClusterError(f"{cgroup} cannot be removed. Fix: `down` again")
        time.sleep(0.02)


def other(places: Places) -> Path | None:
    """Folder of a cluster that runs on this machine for somebody else."""
    plans = {Path(os.fsdecode(words[-1])) for _, words in _nodes()}
    return next((plan.parent for plan in sorted(plans) if plan.parent != places.state), None)


def _ours(places: Places) -> Iterator[tuple[int, list[bytes]]]:
    plan = os.fsencode(places.state / PLAN)
    return ((pid, words) for pid, words in _nodes() if words[-1] == plan)


def _nodes() -> Iterator[tuple[int, list[bytes]]]:
    """Processes that are the first of a node, or started one: id and command, whose last word is the plan."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if b"infra.clouds.local.node" in words:
                yield int(folder.name), words
