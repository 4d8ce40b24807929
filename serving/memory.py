"""How much memory this process may still take: the machine's, or its container's when that is less."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):  # unlike the free pages, counts caches that can be dropped
            machine = int(line.split()[1]) * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())
        return min(machine, limit - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup v2 here, or it says `max`
        return machine
