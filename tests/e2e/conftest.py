"""A real cluster, and the repository's own `dev` stack on it, by the commands that a user types.

Collected only when asked for: `pytest tests/e2e`. Where no cluster can be had, all are skipped by name, with what is missing.
The cluster is the tests' own, beside none of the user's, and begins from nothing. SLIPWAY_E2E_KEEP=1 takes the one that the run
before kept, and keeps it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.apply import ApiError, Cluster
from infra.clouds.local import Places, kind
from infra.clouds.local.golang import MODULES, build
from infra.live import forward
from infra.live.endpoint import endpoint as router_of
from infra.live.pods import state_of
from tests.e2e.bringing import has_pulumi, pulumi_up
from tests.e2e.watching import Prometheus

ROOT = Path(__file__).parents[2]
SLIPWAY = Path(sys.executable).with_name("slipway")
HERE = Path(__file__).parent
Json = dict[str, Any]
PROMETHEUS = "http://prometheus-operated.monitoring:9090"
# `dev` as it is, but for less training, saved and measured often, and with as much more of two CPUs as there is.
BRIEF = {
    "training.steps": 120,
    "training.resources": {"cpus": 0.25, "memory_gib": 1.5},
    "training.checkpoint": {"every_steps": 5, "keep": 2},
    "monitoring": {"prometheus_url": PROMETHEUS, "scrape_interval_s": 5},
}
SETTLED_S = 1500
ADD_ONS = ("keda",)
KEPT = os.environ.get("SLIPWAY_E2E_KEEP") == "1"
STATE = Path.home() / ".local" / "state" / "slipway-e2e"
"""Where the tests' cluster is, and no other."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "e2e: the whole loop on a real Kubernetes")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Minutes on a cluster are for those who ask."""
    asked_for = any(
        (config.invocation_params.dir / arg.split("::")[0]).resolve().is_relative_to(HERE) for arg in config.args
    )
    return None if asked_for else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("e2e")


Tell = Callable[[str], None]


def slipway(
    *words: str, cwd: Path = ROOT, kubeconfig: Path | None = None, check: bool = True, tell: Tell = lambda _: None
) -> subprocess.CompletedProcess[str]:
    """Run the command; what it said is in the report of a test that fails, and its progress goes to `tell` as it comes."""
    environment = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    if kubeconfig:
        environment["KUBECONFIG"] = str(kubeconfig)
    said = list[str]()
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(
            [SLIPWAY, *words], stdout=output, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
        ) as process,
    ):
        assert process.stderr
        try:
            for line in process.stderr:
                said.append(line)
                tell(line.rstrip())
        except BaseException:
            process.kill()  # who was interrupted takes the cluster down, and nobody else may be at work on it
            raise
        process.wait()
        output.seek(0)
        done = subprocess.CompletedProcess(words, process.returncode, output.read(), "".join(said))
    print(f"$ slipway {' '.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    if check:
        assert done.returncode == 0, f"slipway {' '.join(words)}: exit {done.returncode}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Tell:
    """Says a line to whoever waits at the terminal: what a cold machine builds takes it minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            print(line, file=sys.stderr, flush=True)

    return say


@pytest.fixture(scope="session", autouse=True)
def own_state() -> Iterator[None]:
    """What tests ask of a cluster by themselves is the tests' too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(STATE))
        yield


@pytest.fixture(scope="session")
def kubeconfig(tell: Tell) -> Iterator[Path]:
    """The cluster of a run: nothing of one before it, and nothing of it after, however it ends."""
    # A request to end is heard as Ctrl-C is, which lets fixtures clean up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not KEPT:
        slipway("cluster", "down", tell=tell)
    try:
        done = slipway("cluster", "up", *(f"--with={name}" for name in ADD_ONS), "--json", check=False, tell=tell)
        why = done.stderr.strip().rpartition("\n")[2]
        if done.returncode == 2 and why.startswith("error:"):
            pytest.skip(f"no cluster can be had here: {why.removeprefix('error: ')}")
        assert done.returncode == 0, done.stderr
        yield Path(json.loads(done.stdout)["kubeconfig"])
    finally:
        if not KEPT:
            slipway("cluster", "down", tell=tell)
            shutil.rmtree(STATE, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Cluster:
    return Cluster(kubeconfig)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folder with the stack `dev`."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "stacks").mkdir()
    (folder / "Pulumi.yaml").write_text((ROOT / "Pulumi.yaml").read_text())
    write_stack(folder, {})
    return folder


def write_stack(project: Path, changes: dict[str, Any]) -> None:
    """`dev` with values set by dotted path; numbers index lists."""
    document = yaml.safe_load((ROOT / "stacks" / "Pulumi.dev.yaml").read_text())
    for path, value in (BRIEF | changes).items():
        first, *rest = path.split(".")
        keys: list[str | int] = ["slipway:" + first, *(int(key) if key.isdigit() else key for key in rest)]
        node = document["config"]
        for key in keys[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node[keys[-1]] = value
    (project / "stacks" / "Pulumi.dev.yaml").write_text(yaml.safe_dump(document))


def bring(project: Path, kubeconfig: Path, *, tell: Tell) -> Json:
    """The stack as its file is now, up to the ready server: what was created, changed and removed for that."""
    if has_pulumi():
        made = pulumi_up(project, root=ROOT, state=STATE / "pulumi", kubeconfig=kubeconfig, tell=tell)
    else:
        done = slipway("apply", "-s", "dev", "--json", cwd=project, kubeconfig=kubeconfig, tell=tell)
        made = json.loads(done.stdout)
        made = {name: len(made[name]) for name in ("created", "changed", "removed")}
    slipway("status", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig, tell=tell)
    return made


def build_images(*words: str, tell: Tell = lambda _: None) -> None:
    """Of `dev`, on a base image that is made here where none is pulled."""
    base = () if kind.is_possible() else ("--base", "bootstrap")
    slipway("images", "build", "-s", "dev", *base, *words, tell=tell)


@pytest.fixture(scope="session")
def archives(kubeconfig: Path, tell: Tell) -> Iterator[Path]:
    """The images of `dev`, given to the cluster; a folder with an archive of each that was not there."""
    with tempfile.TemporaryDirectory(dir=Places.of_user().cache) as out:
        build_images("--out", out, tell=tell)
        yield Path(out)


@pytest.fixture(scope="session")
def settled(archives: Path, kubeconfig: Path, project: Path, tell: Tell) -> Json:
    """The stack, with its images, up to the ready server; from there on it is `slipway apply`'s."""
    made = bring(project, kubeconfig, tell=tell)
    if has_pulumi():
        # What that made is taken over: an object that is in no inventory would stay when the stack has it no more.
        slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
    return made


@pytest.fixture(scope="session")
def namespace(project: Path) -> str:
    return yaml.safe_load((project / "stacks" / "Pulumi.dev.yaml").read_text())["config"]["slipway:platform"][
        "namespace"
    ]


@pytest.fixture(scope="session")
def kubectl(kubeconfig: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`kubectl("get", "pods")`."""
    program = build(Places.of_user().cache, MODULES, say=print).program("kubectl")

    def run(*words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run([program, "--kubeconfig", kubeconfig, *words], capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def endpoint(cluster: Cluster, namespace: str, settled: Json) -> Iterator[str]:
    """URL of the stack's router, as a developer reaches it from a laptop."""
    with router_of(cluster, namespace=namespace) as url:
        yield url


@pytest.fixture
def prometheus(cluster: Cluster) -> Iterator[Prometheus]:
    with forwarded(cluster, "monitoring", "prometheus-operated", 9090) as url:
        yield Prometheus(url)


def until(holds: Callable[[], bool], what: str, *, within_s: float = 300.0) -> None:
    """Ask again until it is so; an API server that does not answer, or has only begun, is asked again too."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            if holds():
                return
        except ApiError as error:
            if 0 < error.status < 500:
                raise
        assert time.monotonic() < deadline, what
        time.sleep(1)


@contextmanager
def forwarded(cluster: Cluster, namespace: str, service: str, port: int) -> Iterator[str]:
    """URL on this machine of port `port` of a ready pod behind a Service. A connection that breaks takes no other along."""
    selector = cluster.get(f"/api/v1/namespaces/{namespace}/services/{service}")["spec"]["selector"]
    labels = ",".join(f"{name}={value}" for name, value in selector.items())
    pods = cluster.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=labels)["items"]
    ready = next(pod["metadata"]["name"] for pod in pods if state_of(pod) == "ready")
    with forward.forwarded(cluster, namespace=namespace, pod=ready, port=port) as url:
        yield url
