"""Whatever dies, and whoever comes at the same time: nothing stays behind, and the next command works."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from workloads import config_map, container, deployment, job, service

from infra.local import LocalError, down, logs
from infra.local.addresses import AddressBook

SLEEPER = deployment("sleeper", container("sleep", "600"))
ENDLESS = job("endless", container("sleep", "600"))


def supervisor(stack) -> int:
    return next(p.pid for p in stack.processes() if "infra.local.supervisor" in p.cmdline())


def test_a_supervisor_that_is_killed_takes_its_processes_along(stack, eventually):
    stack.up(SLEEPER)
    os.kill(supervisor(stack), signal.SIGKILL)
    eventually(lambda: not stack.status().running)
    eventually(lambda: not stack.processes())
    assert stack.status().workloads[0].state == "Stopped"
    assert stack.up(SLEEPER)[-1].type == "settled", "what it left blocks nothing"


def test_down_finds_what_a_killed_supervisor_left(stack):
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    )
    ready = {"exec": {"command": ["grep", "-q", "on", str(stack.state / "logs/deaf-0/main.log")]}, "periodSeconds": 0.1}
    stack.up(deployment("deaf", container("python", "-c", deaf, readinessProbe=ready)))
    os.kill(supervisor(stack), signal.SIGKILL)
    assert len(stack.processes()) >= 1
    assert down(stack.state).killed >= 1
    assert not stack.processes()
    assert down(stack.state) == down(stack.state), "`down` again finds nothing, and says so"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_an_up_that_ends_early_stops_everything(stack, eventually, number):
    calling = stack.start_up(SLEEPER, ENDLESS)
    eventually(lambda: stack.pids().get("endless-0") and stack.pids().get("sleeper-0"))
    calling.send_signal(number)
    calling.communicate(timeout=20)
    if number == signal.SIGINT:
        assert not stack.processes(), "Ctrl-C returns when everything is gone"
    eventually(lambda: not stack.processes())
    assert stack.up(SLEEPER)[-1].type == "settled"


def test_a_supervisor_killed_under_an_up(stack, eventually):
    calling = stack.start_up(ENDLESS)
    eventually(lambda: stack.pids().get("endless-0"))
    os.kill(supervisor(stack), signal.SIGKILL)
    _, said = calling.communicate(timeout=20)
    assert calling.returncode == 1
    assert said.startswith("error: the supervisor ended")
    assert said.count("\n") == 1
    assert not stack.processes()


def test_two_ups_at_once_and_a_down_beside_one(stack, eventually):
    calling = stack.start_up(ENDLESS)
    eventually(lambda: stack.pids().get("endless-0"))
    with pytest.raises(LocalError, match="another `up` is under way") as refused:
        stack.up()
    assert refused.value.exit_code == 2
    assert stack.pids()["endless-0"], "the first goes on"
    assert down(stack.state).was_running
    _, said = calling.communicate(timeout=20)
    assert (calling.returncode, said) == (1, f"error: stopped by a `down` ({stack.state})\n")


def test_a_port_in_use_is_refused_before_anything_starts(stack):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        public = service("sleeper", ports=[{"port": port, "targetPort": 8000}], type="LoadBalancer")
        with pytest.raises(LocalError, match=f"port {port} of 127.0.0.1 is in use.*Stop what holds it") as refused:
            stack.up(public, deployment("sleeper", container("sleep", "600", ports={"http": 8000})), ENDLESS)
    assert refused.value.exit_code == 2
    assert not stack.processes()
    assert not (stack.state / "logs").exists()


def test_manifests_that_cannot_run_change_nothing(stack):
    with pytest.raises(LocalError, match="slipway render") as refused:
        stack.up()
    assert refused.value.exit_code == 2
    stack.up(SLEEPER)
    before = stack.pids()
    with pytest.raises(LocalError, match="no ConfigMap 'none'"):
        stack.up(deployment("other", container("true"), volumes=[{"name": "x", "configMap": {"name": "none"}}]))
    assert stack.pids() == before


def test_secrets_of_the_caller_do_not_reach_a_container(stack, monkeypatch):
    monkeypatch.setenv("CLOUD_TOKEN", "hunter2")
    stack.up(job("env", container("env")))
    assert "PATH=" in stack.log("env-0")
    assert "hunter2" not in stack.log("env-0")


def test_purge_takes_the_volumes_and_only_a_stack_s_own_directory(stack, tmp_path):
    stack.up(SLEEPER)
    down(stack.state, purge=True)
    assert not stack.state.exists()
    assert not down(stack.state, purge=True).was_running
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    with pytest.raises(LocalError, match="no state of a stack"):
        down(tmp_path / "home", purge=True)
    assert (tmp_path / "home" / "thesis").exists()
    (tmp_path / "rendered" / "manifests").mkdir(parents=True)
    down(tmp_path / "rendered", purge=True)
    assert not (tmp_path / "rendered").exists()


@pytest.mark.parametrize("removed", ["state", "socket"])
def test_files_that_were_removed_under_it(stack, removed):
    stack.up(SLEEPER)
    meeting = Path(json.loads((stack.state / "supervisor.json").read_text())["socket"]).parent
    shutil.rmtree(stack.state if removed == "state" else meeting, ignore_errors=True)
    assert down(stack.state).killed == 0, "it still stops gracefully"
    assert not stack.processes()
    assert not meeting.exists()


def test_stale_and_broken_files_block_nothing(stack):
    stack.state.mkdir()
    (stack.state / "supervisor.json").write_text(f'{{"pid": {os.getpid()}, "socket": "/nowhere/at/all"}}')
    (stack.state / "supervisor.lock").touch()
    (stack.state / "up.lock").touch()
    (stack.state / "status.json").write_text("{")
    assert not stack.status().running
    stack.up(SLEEPER)


def test_what_one_machine_does_not_run_is_said(stack):
    stack.up(SLEEPER, {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"}})
    assert stack.status().warnings == ["StatefulSet/db is not run on one machine"]


def test_logs(stack):
    script = "import json; print('plain'); print(json.dumps({'event': 'progress', 'done': 1})); print('last', end='')"
    events = stack.up(job("talk", container("python", "-c", script)), config_map("unused", a="b"))
    assert [e.event for e in events if e.type == "log"] == [{"event": "progress", "done": 1}]
    lines = [(line.pod, line.container, line.text) for line in logs(stack.state, "talk")]
    assert lines[0] == ("talk-0", "main", "plain")
    assert stack.log("talk-0").endswith("last")
    with pytest.raises(LocalError, match="Choose one of: talk"):
        list(logs(stack.state, "tale"))


def test_logs_are_followed_and_bounded(stack, eventually):
    flood = "import sys\nfor n in range(100_000): print(f'{n:99d}')\nimport time; time.sleep(600)"
    ready = {"exec": {"command": ["grep", "-q", " 99999", str(stack.state / "logs/flood-0/main.log")]}}
    stack.up(deployment("flood", container("python", "-c", flood, readinessProbe={**ready, "periodSeconds": 0.2})))
    files = sorted((stack.state / "logs/flood-0").iterdir())
    assert [f.name for f in files] == ["main.log", "main.log.1"]
    assert sum(f.stat().st_size for f in files) < 9 * 2**20
    following = logs(stack.state, "flood", follow=True)
    text = next(line.text for line in following if line.text.endswith("99999"))
    assert int(text) == 99_999


def test_a_free_port_is_below_those_of_outgoing_connections():
    assert AddressBook()._free_port() < 32_768


def test_two_services_at_one_port_are_refused(stack):
    port = AddressBook()._free_port()
    both = [
        o
        for name in ("a", "b")
        for o in (
            service(name, ports=[{"port": port, "targetPort": 8000}], type="LoadBalancer"),
            deployment(name, container("sleep", "600", ports={"http": 8000})),
        )
    ]
    with pytest.raises(LocalError, match=f"port {port} publishes Deployment/a already"):
        stack.up(*both)
