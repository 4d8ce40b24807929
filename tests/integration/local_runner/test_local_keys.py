"""A service that asks for API keys, on this machine: what a person types, real servers, router and session store, and no
trace of the keys."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from infra.local.processes import STATE_MARK, marked
from tests.ports import free_port
from tests.redis_server import redis_server
from tests.unit.serving.tiny_packages import make_package, point, publish

ROOT = Path(__file__).parents[3]
SLIPWAY = Path(sys.executable).parent / "slipway"


class Project:
    """A checkout with one stack, `keyed`, whose model is published already; the user's own settings beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder / "project", free_port()
        self.state = self.folder / ".slipway" / "keyed"
        self.home = folder / "home"
        (self.folder / "stacks").mkdir(parents=True)
        (self.folder / "Pulumi.yaml").write_text((ROOT / "Pulumi.yaml").read_text())
        service = {"name": "chat", "model": "tiny", "pool": "laptop", "api_keys_secret": "chat-keys", "drain_s": 1}
        service |= {"resources": {"cpus": 1, "memory_gib": 2}, "kv_gib": 0.01, "max_num_seqs": 2, "replicas": 2}
        service |= {"session_store": {"secret": "chat-store"}}
        config = {
            "slipway:platform": {"cloud": "local"},
            "slipway:node_pools": [{"name": "laptop", "instance": "cpu"}],
            "slipway:services": [service],
            "slipway:router": {"port": self.port, "replicas": 1},
        }
        (self.folder / "stacks" / "Pulumi.keyed.yaml").write_text(yaml.safe_dump({"config": config}))
        registry = self.state / "volumes" / "registry"
        point(registry, publish(make_package(folder / "package"), registry))

    def run(self, *command: str | Path, said: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(self.home)}
        return subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=environment,
            input=said,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def ask(self, key: str | None) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"model": "tiny", "prompt": "def ", "max_tokens": 2}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False).status_code

    @contextlib.contextmanager
    def logged_in(self, key: str) -> Iterator[httpx.Client]:
        """A browser, as it were: nothing but its cookie says who it is."""
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False) as browser:
            assert browser.post("/web/login", json={"key": key}).status_code == 200
            yield browser


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path)
    yield made
    done = made.run(SLIPWAY, "local", "down", "-s", "keyed")
    assert done.returncode == 0, done.stderr


def test_keys_are_asked_for_made_by_the_command_that_is_shown_and_held_nowhere_else(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        told = project.run(SLIPWAY, "local", "secret", "set", "-s", "keyed", "chat-store", "url", said=url)
        assert told.returncode == 0, told.stderr
        keyed_service(project, store=url)


def keyed_service(project: Project, *, store: str) -> None:
    refused = project.run(SLIPWAY, "local", "up", "-s", "keyed")
    assert refused.returncode == 2
    (fix,) = re.findall(
        r"no keys.json of Secret 'chat-keys' on this machine \(services.chat\). Fix: (.*)", refused.stderr
    )
    assert not (project.state / "manifests").exists()

    made = project.run("sh", "-c", fix)
    assert made.returncode == 0, made.stderr
    key = re.findall(r"shown this once: (\S+)", made.stderr)[0]
    (kept,) = (project.home / "slipway" / "secrets" / "keyed" / "chat-keys").iterdir()
    (entry,) = json.loads(kept.read_text())["keys"]

    up = project.run(SLIPWAY, "local", "up", "-s", "keyed")
    assert up.returncode == 0, up.stderr
    assert '-H "authorization: Bearer $SLIPWAY_API_KEY"' in up.stderr
    assert [project.ask(None), project.ask(f"{key}x"), project.ask(key)] == [401, 401, 200]

    with project.logged_in(key) as browser:  # by one replica, and known to both
        kept = {"title": "A talk", "messages": [{"role": "user", "content": "Hello"}]}
        assert browser.put("/web/conversations/a-talk", json=kept).status_code == 204
        seen = [browser.get("/web/conversations").json()["conversations"] for _ in range(20)]
        assert [[talk["title"] for talk in talks] for talks in seen] == [["A talk"]] * 20
        assert browser.post("/web/logout").status_code == 204
        assert {browser.get("/web/conversations").status_code for _ in range(20)} == {401}

    for word in (key, entry["sha256"], store):
        assert word not in up.stdout + up.stderr
        written = [path for path in project.state.rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [path for path in written if word.encode() in path.read_bytes()]
        assert not [process for process in command_lines(project.state) if word in process]


def command_lines(state: Path) -> list[str]:
    processes = list(marked(STATE_MARK, str(state.resolve())))
    assert processes
    found = []
    for process in processes:
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found
