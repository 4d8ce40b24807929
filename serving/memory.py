"""How much memory this process may still take: the machine's, or its container's when that is less; and what one has."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def resident_bytes(pid: int) -> int:
    """What a process has in memory; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def limit_bytes() -> int:
    """All that there could ever be."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2 here, or it says `max`
        return machine


def available_bytes() -> int:
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):  # unlike the free pages, counts caches that can be dropped
            machine = int(line.split()[1]) * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files that were not used lately are dropped before anyone is killed: what Kubernetes calls working set.
        return min(machine, limit - used + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no cgroup v2 here, or it says `max`
        return machine
