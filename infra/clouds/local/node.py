"""The first process of the node: inside namespaces of its own it sets the node up, starts its processes and keeps them running.

When it ends, the kernel ends every process of the node and takes mounts, interfaces and nft rules with them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.clouds.local.places import LINK_BITS, MACHINE_IP, NODE, NODE_IP, Places
from infra.clouds.local.settings import Process
from infra.clouds.local.shell import run

RESTART_AFTER_S = 1.0
LINK = "eth0"


def main(plan: Path) -> None:
    """Run the node that `plan` (see `machine.start`) says, until this process is killed."""
    document = json.loads(plan.read_text())
    places = Places(state=Path(document["state"]), cache=Path(document["cache"]))
    _mount(places)
    _network()
    # PID 1 gets no signal that it does not ask for.
    signal.signal(signal.SIGTERM, _end)
    processes = [Process(name=name, command=tuple(command)) for name, command in document["processes"]]
    _keep_running(processes, places, environment=document["environment"])


def _end(number: int, frame: object) -> None:
    del number, frame
    os._exit(0)


def _mount(places: Places) -> None:
    """The node's own /run, /var/lib and /var/log, in folders of the cluster's; mounts of pods reach containers."""
    for folder, over in ((places.shared, "/run"), (places.library, "/var/lib"), (places.logs, "/var/log")):
        _do("mount", "--bind", str(folder), over)
    _do("mount", "--make-rshared", "/")
    Path("/proc/sys/kernel/hostname").write_text(NODE)


def _network() -> None:
    """Address and route of the link, whose other end the machine has."""
    _do("ip", "link", "set", "lo", "up")
    while not Path(f"/proc/sys/net/ipv4/conf/{LINK}").exists():
        time.sleep(0.02)  # the machine moves it in
    _do("ip", "address", "add", f"{NODE_IP}/{LINK_BITS}", "dev", LINK)
    _do("ip", "link", "set", LINK, "up")
    _do("ip", "route", "add", "default", "via", MACHINE_IP)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _keep_running(processes: list[Process], places: Places, *, environment: dict[str, str]) -> None:
    """Start what is to run, start again what ends, and reap what others left behind."""
    due = {process.name: (process, 0.0) for process in processes}
    running: dict[int, Process] = {}
    while True:
        now = time.monotonic()
        for name, (process, at) in list(due.items()):
            if now >= at:
                running[_start(process, places, environment).pid] = process
                del due[name]
        pid = _reap()
        if pid in running:
            process = running.pop(pid)
            due[process.name] = (process, time.monotonic() + RESTART_AFTER_S)
        elif pid == 0:
            time.sleep(0.1)


def _start(process: Process, places: Places, environment: dict[str, str]) -> "subprocess.Popen[Any]":
    with (places.logs / f"{process.name}.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603
            process.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _reap() -> int:
    """Id of a child that ended, 0 for none: orphans of the node become children of its first process."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def _do(*command: str) -> None:
    run(*command).check_returncode()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
