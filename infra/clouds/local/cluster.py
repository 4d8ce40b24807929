"""The cluster as a whole: up, down, what it is, and images into it. One node of our own, or kind where Docker is."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from infra.apply.client import ApiError, Cluster
from infra.clouds.local import addons, archive, debian, go, golang, kind, machine, options, settings
from infra.clouds.local.debian import Debian, Say
from infra.clouds.local.golang import Built
from infra.clouds.local.options import AddOn
from infra.clouds.local.places import ClusterError, Places, Unable
from infra.clouds.local.shell import run

How = Literal["kubeconfig", "kind", "node"]
READY_S = 120.0
# Of these programs the node has an image each.
IMAGES = ("coredns", "metrics-server")


@dataclass(frozen=True, kw_only=True)
class Status:
    up: bool
    how: How | None = None
    kubeconfig: Path | None = None
    version: str = ""
    nodes_ready: int = 0
    gpus: int = 0
    """Stand-ins: they are scheduled, and compute nothing."""
    network_policies: Literal["enforced", "not enforced", "unknown"] = "unknown"
    add_ons: tuple[AddOn, ...] = ()
    """Those that it has."""
    waiting: tuple[str, ...] = ()
    """What is not ready yet, and why."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What a cluster is to have beyond itself."""

    gpus: int = 0
    add_ons: Sequence[AddOn] = ()
    programs: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Image → program, of the add-ons."""


def up(places: Places, *, kubeconfig: Path | None, gpus: int, add_ons: Sequence[AddOn] = (), say: Say) -> Status:
    """Have a cluster that is ready: the one of `kubeconfig`, kind's where Docker is, else a node of this machine; and `add_ons` in it.

    Idempotent; what a killed run left is taken down first. Raises `Unable` where it cannot be, `ClusterError` where it fails.
    """
    if kubeconfig is not None:
        if add_ons:
            raise Unable("add-ons of your own cluster are yours to install. Fix: their Helm charts, or no --kubeconfig")
        _check(kubeconfig)
        return _prepared("kubeconfig", places, kubeconfig, wanted=_Wanted(), say=say)
    by_kind = kind.is_possible()
    if not by_kind:
        machine.check()
        if not machine.pids(places):
            machine.check_room(places)
    names = options.with_needs(add_ons)
    wanted = _Wanted(gpus=gpus, add_ons=names, programs=options.programs(places.cache, names, say=say))
    if by_kind:
        kind.up(places.kubeconfig, cache=places.cache, say=say)
        return _prepared("kind", places, places.kubeconfig, wanted=wanted, say=say)
    programs = debian.programs(places.cache, debian.NODE_PROGRAMS, files=debian.NODE_FILES, say=say)
    built = golang.build(places.cache, say=say)
    if machine.pids(places) and places.kubeconfig.exists():
        say("the node runs already")
    else:
        machine.stop(places)
        try:
            _start(places, programs, built, say=say)
        except BaseException:
            machine.stop(places)
            raise
    return _prepared("node", places, places.kubeconfig, wanted=wanted, say=say)


def down(places: Places, *, say: Say) -> bool:
    """Remove the cluster and everything that it made on this machine; the cache stays. Whether there was one."""
    if kind.is_up():
        say("removing kind's cluster")
        kind.down(places.cache)
        shutil.rmtree(places.state, ignore_errors=True)
        return True
    if machine.is_clean(places):
        return False
    machine.check()
    machine.stop(places)
    return True


def status(places: Places, kubeconfig: Path | None = None) -> Status:
    """What there is, and what is not ready."""
    how = _how(places, kubeconfig)
    path = kubeconfig or places.kubeconfig
    if how is None or not path.exists():
        return Status(up=False)
    try:
        cluster = Cluster(path)
        version = cluster.get("/version")["gitVersion"]
        nodes = cluster.get("/api/v1/nodes")["items"]
    except ApiError as error:
        return Status(up=False, how=how, kubeconfig=path, waiting=(f"API server: {error}",))
    ready = [node for node in nodes if _is_ready(node)]
    waiting = [f"node {node['metadata']['name']} is not ready" for node in nodes if node not in ready]
    return Status(
        up=True,
        how=how,
        kubeconfig=path,
        version=version,
        nodes_ready=len(ready),
        gpus=sum(int(node["status"].get("capacity", {}).get(addons.GPU, 0)) for node in nodes),
        network_policies="unknown" if how == "kubeconfig" else "enforced",
        add_ons=addons.installed(cluster) if how != "kubeconfig" else (),
        waiting=(*waiting, *(addons.waiting(cluster) if how != "kubeconfig" else ())),
    )


def load_image(places: Places, path: Path, *, say: Say) -> None:
    """Give the nodes the images of an OCI or Docker archive. Raises `ClusterError`."""
    how = _how(places, None)
    say(f"loading {path.name} ({path.stat().st_size / 1e6:.0f} MB)")
    if how == "kind":
        kind.load(path, cache=places.cache)
    elif how == "node":
        programs = debian.programs(places.cache, debian.NODE_PROGRAMS, files=debian.NODE_FILES, say=say)
        _import(places, programs, path)
    else:
        raise ClusterError("no cluster of Slipway's runs here. Fix: slipway cluster up")


def images(places: Places) -> set[str]:
    """References of the images that the node has; of kind's nodes nothing is known."""
    if _how(places, None) != "node":
        return set()
    programs = debian.programs(places.cache, debian.NODE_PROGRAMS, files=debian.NODE_FILES, say=lambda _: None)
    done = _ctr(places, programs, "images", "list", "--quiet")
    return set(done.stdout.split())


def reference_of(program: str) -> str:
    """The image of an add-on's program, as its manifest has it."""
    return f"localhost/{program}:1"


def _start(places: Places, programs: Debian, built: Built, *, say: Say) -> None:
    say("making keys")
    places.settings.mkdir(parents=True)
    _keys(places, built)
    settings.write(places, programs, may_raise_oom_score=machine.may_raise_oom_score())
    say("starting the node")
    machine.start(places, programs, settings.processes(places, built, python=sys.executable))
    _until(lambda: (places.shared / "containerd" / "containerd.sock").exists(), "containerd does not start", places)
    own = {name: built.program(name) for name in IMAGES}
    with tempfile.TemporaryDirectory(dir=places.state) as folder:
        for path in _images(own, Path(folder)):
            _import(places, programs, path)
        shell, forever = programs.file("bin/busybox"), ["/bin/busybox", "sleep", "2147483647"]
        pause = Path(folder, "node.tar")
        archive.write(pause, reference=settings.PAUSE, program=shell, command=forever)
        _import(places, programs, pause)


def _keys(places: Places, built: Built) -> None:
    """By kubeadm: a CA, every component's certificate and kubeconfig, and the user's."""
    config = places.settings / "kubeadm.yaml"
    config.write_text(yaml.safe_dump_all(settings.kubeadm(places)))
    kubeadm = built.program("kubeadm")
    phases = (
        ["certs", "all", "--config", str(config)],
        ["kubeconfig", "all", "--config", str(config), "--kubeconfig-dir", str(places.keys)],
    )
    for phase in phases:
        done = run(kubeadm, "init", "phase", *phase)
        if done.returncode:
            raise ClusterError(f"kubeadm makes no {phase[0]}: {done.stderr.strip()[-400:]}")
    shutil.copyfile(places.keys / "super-admin.conf", places.kubeconfig)
    places.kubeconfig.chmod(0o600)


def _images(programs: Mapping[str, Path], folder: Path) -> Iterator[Path]:
    """An archive for each `localhost/NAME:1`, of its one program; the one before is gone when the next is made."""
    for name, program in programs.items():
        path = folder / f"{name}.tar"
        archive.write(path, reference=reference_of(name), program=program)
        yield path
        path.unlink()


def _import(places: Places, programs: Debian, path: Path) -> None:
    done = _ctr(places, programs, "images", "import", str(path))
    if done.returncode:
        raise ClusterError(f"containerd does not take {path.name}: {done.stderr.strip()[-300:]}")


def _ctr(places: Places, programs: Debian, *words: str) -> "subprocess.CompletedProcess[str]":
    """`ctr` in the node's namespaces: it mounts what it unpacks."""
    pid = str(machine.node_pid(places))
    command = [
        "nsenter",
        "--target",
        pid,
        "--mount",
        "ctr",
        "--address",
        settings.SOCKET,
        "--namespace",
        "k8s.io",
        *words,
    ]
    return run(*command, env=programs.env)


def _prepared(how: How, places: Places, kubeconfig: Path, *, wanted: _Wanted, say: Say) -> Status:
    say("waiting for the API server")
    cluster: Any = None

    def answers() -> bool:
        nonlocal cluster
        with contextlib.suppress(ApiError):
            cluster = cluster or Cluster(kubeconfig)
            return any(_is_ready(node) for node in cluster.get("/api/v1/nodes")["items"])
        return False

    _until(answers, "no node gets ready", places)
    if how != "kubeconfig":
        _add(how, places, cluster, wanted=wanted, say=say)
    addons.stand_in_gpus(cluster, wanted.gpus)
    _until(lambda: how == "kubeconfig" or not addons.waiting(cluster), "the add-ons do not get ready", places)
    return status(places, kubeconfig if how == "kubeconfig" else None)


def _add(how: How, places: Places, cluster: Cluster, *, wanted: _Wanted, say: Say) -> None:
    """The add-ons' images, kinds and objects."""
    there = images(places)
    missing = {name: program for name, program in wanted.programs.items() if reference_of(name) not in there}
    with tempfile.TemporaryDirectory(dir=places.state) as folder:
        for path in _images(missing, Path(folder)):
            load_image(places, path, say=say)
    say(f"adding {', '.join(('names, volumes, metrics', *wanted.add_ons))}")
    kinds = addons.define(cluster, wanted.add_ons, compiler=go.program(places.cache, say=say))
    _until(lambda: not addons.unknown(cluster, kinds), "the API server does not take the kinds of add-ons", places)
    addons.install(cluster, everything=how == "node", options=wanted.add_ons)


def _check(kubeconfig: Path) -> None:
    """Raises `Unable` for a file that names no cluster: that one is not waited for."""
    try:
        Cluster(kubeconfig)
    except ApiError as error:
        raise Unable(str(error)) from None


def _how(places: Places, kubeconfig: Path | None) -> How | None:
    if kubeconfig is not None:
        return "kubeconfig"
    if machine.pids(places):
        return "node"
    return "kind" if kind.is_up() else None


def _is_ready(node: dict[str, Any]) -> bool:
    conditions = node.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _until(holds: Callable[[], bool], otherwise: str, places: Places) -> None:
    until = time.monotonic() + READY_S
    while not holds():
        if time.monotonic() > until:
            where = f"read the logs in {places.logs}" if places.logs.exists() else "look with kubectl get nodes"
            raise ClusterError(f"{otherwise} within {READY_S:.0f} s. Fix: {where}")
        time.sleep(0.2)
