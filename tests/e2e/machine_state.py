"""What a cluster could leave on the machine: processes, mounts, interfaces, routes, rules, cgroups, settings, files."""

import re
from pathlib import Path

from infra.clouds.local import Places, debian
from infra.clouds.local.machine import SYSCTLS
from infra.clouds.local.shell import run
from tests.e2e.conftest import STATE

PROGRAMS = ("kube", "etcd", "containerd", "runc", "coredns", "metrics-server", "infra.clouds.local")
# Where programs leave things that outlive them.
FOLDERS = (
    "/etc",
    "/etc/cni",
    "/run",
    "/run/netns",
    "/var/lib",
    "/var/lib/cni",
    "/var/log",
    "~",
    "~/.local/state",
    str(STATE),
    "~/.cache",
)
Snapshot = dict[str, set[str]]


def snapshot() -> Snapshot:
    """Each kind of thing → what there is of it."""
    return {
        "processes": _processes(),
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "interfaces": {path.name for path in Path("/sys/class/net").iterdir()},
        "routes": set(Path("/proc/net/route").read_text().splitlines()),
        "rules": _rules(),
        "cgroups": {str(path) for path in Path("/sys/fs/cgroup").glob("**/slipway*")},
        "settings": {f"{name}={path.read_text()}" for name in SYSCTLS if (path := Path("/proc/sys", name)).exists()},
        "files": {str(path) for name in FOLDERS for path in Path(name).expanduser().glob("*")} - {str(STATE)},
    }


def difference(before: Snapshot, after: Snapshot) -> dict[str, list[str]]:
    """What is there now and was not, or the other way round, of each kind that differs."""
    found = {kind: sorted(before[kind] ^ after[kind]) for kind in before}
    return {kind: changed for kind, changed in found.items() if changed}


def _processes() -> set[str]:
    """Of a node: others come and go on a machine."""
    found: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        program = command.split(" ", 1)[0]
        if any(name in program for name in PROGRAMS) or "infra.clouds.local.node" in command:
            found.add(f"{folder.name} {command}")
    return found


def _rules() -> set[str]:
    """Of the kernel's routing and filtering; counters apart."""
    programs = debian.programs(Places.of_user().cache, debian.NODE_PROGRAMS, files=debian.NODE_FILES, say=print)
    commands = (("ip", "rule", "list"), ("ip", "-6", "route", "list", "table", "all"), ("nft", "list", "ruleset"))
    lines = (line for command in commands for line in run(*command, env=programs.env).stdout.splitlines())
    return {re.sub(r"packets \d+ bytes \d+|expires \d+sec", "", line) for line in lines}
