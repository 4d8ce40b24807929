"""Jobs as processes: order, another try, giving up, gangs."""

import sys
from pathlib import Path

import pytest
from workloads import config_map, container, job, service

from infra.local import LocalError, down

CLAIM = {"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]}
MOUNT = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}


def script(text: str, *args: str, name: str = "main", **rest):
    return container("python", "-c", text, *args, name=name, **MOUNT, **rest)


APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
# Exits with the codes given, one a try; the tries are counted in a file of the claim.
EXITS = """
import pathlib, sys, json
path = pathlib.Path(sys.argv[1]); tries = len(path.read_text()) if path.exists() else 0
path.write_text("x" * (tries + 1))
code = int(sys.argv[2 + min(tries, len(sys.argv) - 3)])
if code: print(json.dumps({"event": "error", "message": f"try {tries} went wrong"}))
sys.exit(code)
"""
POLICY = {
    "podFailurePolicy": {
        "rules": [
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}},
        ]
    }
}


def exits(name: str, *codes: int, spec: dict | None = None):
    return job(name, script(EXITS, f"/data/{name}", *map(str, codes)), spec={**POLICY, **(spec or {})}, **CLAIM)


def test_init_containers_run_in_order_and_jobs_wait_for_each_other(stack):
    waiting = "import sys, time, pathlib\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)"
    first = job(
        "first",
        container("mv", "/data/part", "/data/order", **MOUNT),
        initContainers=[script(APPEND, "/data/part", "a", name="i"), script(APPEND, "/data/part", "b", name="j")],
        **CLAIM,
    )
    second = job(
        "second",
        container(
            "sh",
            "-c",
            "cat /data/order /etc/slipway/greeting",
            **{"volumeMounts": [*MOUNT["volumeMounts"], {"name": "c", "mountPath": "/etc/slipway"}]},
        ),
        initContainers=[script(waiting, "/data/order", name="wait")],
        volumes=[*CLAIM["volumes"], {"name": "c", "configMap": {"name": "greeting"}}],
    )
    events = stack.up(second, first, config_map("greeting", greeting="hello"))
    assert events[-1].type == "settled"
    assert [w.state for w in stack.status().workloads] == ["Complete", "Complete"]
    assert stack.log("second-0") == "abhello"


def test_a_failure_is_tried_again_and_an_interruption_does_not_count(stack):
    events = stack.up(exits("train", 75, 1, 75, 0, spec={"backoffLimit": 1}))
    assert (stack.volume("data") / "train").read_text() == "xxxx"
    assert stack.status().workloads[0].restarts == 3
    assert [e.event["message"] for e in events if e.type == "log"] == [f"try {n} went wrong" for n in range(3)]
    assert {(e.workload, e.pod, e.container) for e in events if e.type == "log"} == {("Job/train", "train-0", "main")}


@pytest.mark.parametrize(
    ("codes", "spec", "exit_code", "tries"),
    [((2, 0), {}, 2, 1), ((1,), {"backoffLimit": 1}, 1, 2), ((1,), {"backoffLimitPerIndex": 0}, 1, 1)],
)
def test_a_job_that_fails_for_good_takes_what_was_started_with_it(stack, codes, spec, exit_code, tries):
    bystander = job("other", container("sleep", "600"))
    with pytest.raises(LocalError, match=f"Job/train failed.*try {tries - 1} went wrong") as failed:
        stack.up(exits("train", *codes, spec=spec), bystander)
    assert failed.value.exit_code == exit_code
    assert not stack.processes()
    assert not stack.status().running
    assert (stack.volume("data") / "train").read_text() == "x" * tries, "volumes stay"
    assert "went wrong" in stack.log("train-0"), "logs stay"
    # The next `up` tries again.
    (stack.volume("data") / "train").write_text("x" * 9)
    assert stack.up(exits("train", 0))[-1].type == "settled"


def test_on_failure_restarts_the_container_in_its_pod(stack):
    stack.up(job("train", script(EXITS, "/data/n", "1", "0"), **CLAIM, restartPolicy="OnFailure"))
    assert stack.status().workloads[0].pods[0].restarts == 1
    with pytest.raises(LocalError, match="Job/bad failed"):
        stack.up(job("bad", container("false"), spec={"backoffLimit": 1}, restartPolicy="OnFailure"))


def test_a_program_that_does_not_exist(stack):
    with pytest.raises(LocalError, match="cannot start no-such-program"):
        stack.up(job("train", container("no-such-program"), spec={"backoffLimit": 0}))


def test_a_deadline(stack):
    with pytest.raises(LocalError, match="activeDeadlineSeconds"):
        stack.up(job("train", container("sleep", "600"), spec={"activeDeadlineSeconds": 1}))
    assert not stack.processes()


GANG = """
import os, socket, sys
index, (host, port) = int(os.environ["JOB_COMPLETION_INDEX"]), sys.argv[1].split(":")
if index == 0:
    server = socket.create_server((host, int(os.environ["RDZV_PORT"])))
    print("met", sorted(server.accept()[0].recv(9).decode() for _ in range(2)))
else:
    while True:
        try:
            socket.create_connection((host, int(port))).sendall(f"rank{index}".encode()); break
        except ConnectionRefusedError: pass
"""


def test_an_indexed_job_meets_at_the_name_of_its_first_pod(stack):
    headless = service("train", selector={"job-name": "train"}, ports=[{"port": 29400}], clusterIP="None")
    env = [{"name": "RDZV_ENDPOINT", "value": "train-0.train.team.svc:29400"}]
    trainer = container("python", "-c", GANG, "$(RDZV_ENDPOINT)", ports={"rdzv": 29400}, env=env)
    stack.up(headless, job("train", trainer, spec={"completionMode": "Indexed", "completions": 3, "parallelism": 3}))
    assert "met ['rank1', 'rank2']" in stack.log("train-0")
    assert stack.status().workloads[0].ready == 3


def test_what_a_container_started_ends_with_it(stack, eventually):
    """As torchrun's ranks: in a session of their own, and deaf to SIGTERM."""
    rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)"
    stack.up(job("train", container("python", "-c", launcher)))
    assert [p.cmdline()[2] for p in stack.processes()] == ["infra.local.supervisor"]


def test_completed_jobs_are_remembered_by_name_until_their_claim_is_gone(stack):
    stack.up(job("train-a", script(APPEND, "/data/runs", "a"), **CLAIM))
    stack.up(job("train-a", script(APPEND, "/data/runs", "a"), **CLAIM))
    runs = stack.volume("data") / "runs"
    assert runs.read_text() == "a"
    assert down(stack.state).was_running
    both = (
        job("train-a", script(APPEND, "/data/runs", "a"), **CLAIM),
        job("b", script(APPEND, "/data/runs", "b"), **CLAIM),
    )
    stack.up(*both)
    assert runs.read_text() == "ab", "only the new one ran"
    down(stack.state)
    runs.unlink()
    runs.parent.rmdir()
    stack.up(*both)
    assert sorted(runs.read_text()) == ["a", "b"], "what they had written was gone"
    down(stack.state)
    (stack.state / "jobs.json").write_text("{")
    stack.up(*both)
    assert len(runs.read_text()) == 4
    assert "jobs.json cannot be read" in (stack.state / "supervisor.log").read_text()


def test_python_is_the_interpreter_that_runs_the_tests(stack):
    stack.up(job("who", container("python", "-c", "import sys, infra; print(sys.executable, infra.__file__)")))
    assert stack.log("who-0").split()[0] == sys.executable
    assert Path(stack.log("who-0").split()[1]).is_file()
