"""Deployments as processes: probes, restarts, roll-outs behind a real Envoy."""

import os
import signal
import threading

import httpx
import pytest
from workloads import config_map, container, deployment, service

from infra.local import LocalError, down
from infra.local.addresses import AddressBook

# Answers with its version; unready and unhealthy while a file says so. On SIGTERM it finishes what it has begun.
SERVER = """
import os, pathlib, signal, sys, threading, http.server
here = pathlib.Path(os.environ["HOME"])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        bad = self.path.strip("/") and (here / self.path.strip("/")).exists()
        body = sys.argv[1].encode()
        self.send_response(503 if bad else 200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = False
server = Server(("127.0.0.1", int(os.environ["HTTP_PORT"])), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
os._exit(0)
"""


def probe(path: str, **rest):
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": 0.2, "failureThreshold": 2, **rest}


def server(version: str, **rest):
    return container("python", "-c", SERVER, version, ports={"http": 8000}, readinessProbe=probe("/unready"), **rest)


ENVOY = """
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: 0.0.0.0, port_value: 10000}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - {name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: web}}]}
  clusters:
  - name: web
    type: STRICT_DNS
    load_assignment:
      cluster_name: web
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: web.team.svc.cluster.local, port_value: 80}}}
"""


def router(port: int):
    envoy = container(
        *("envoy", "-c", "/etc/envoy/envoy.yaml", "--concurrency", "1", "-l", "warn"),
        name="envoy",
        ports={"http": 10000},
        readinessProbe=probe("/"),
        volumeMounts=[{"name": "config", "mountPath": "/etc/envoy"}],
    )
    return [
        service("web", ports=[{"port": 80, "targetPort": "http"}], clusterIP="None"),
        service("router", ports=[{"port": port, "targetPort": "http"}], type="LoadBalancer"),
        config_map("envoy", **{"envoy.yaml": ENVOY}),
        deployment("router", envoy, volumes=[{"name": "config", "configMap": {"name": "envoy"}}]),
    ]


@pytest.fixture
def free_port() -> int:
    return AddressBook()._free_port()


def test_a_roll_out_behind_envoy_is_not_seen_by_a_client(stack, free_port):
    rolling = {"replicas": 2, "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}}

    def web(version: str, spec=rolling):
        return deployment("web", server(version, lifecycle={"preStop": {"sleep": {"seconds": 1}}}), spec=spec)

    stack.up(*router(free_port), web("one"))
    envoy = stack.pids()["router-0"]
    assert next(w for w in stack.status().workloads if w.name == "router").url == f"http://127.0.0.1:{free_port}"
    answers: list[str] = []
    rolled = threading.Event()

    def ask() -> None:
        with httpx.Client(trust_env=False) as client:
            while not rolled.is_set():
                answer = client.get(f"http://127.0.0.1:{free_port}/")
                answers.append(answer.text if answer.status_code == 200 else f"{answer.status_code} {answer.text}")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        stack.up(*router(free_port), web("two"))
        # Down to one and up to three: Envoy follows, and is itself not touched.
        stack.up(*router(free_port), web("two", {"replicas": 1}))
        stack.up(*router(free_port), web("two", {"replicas": 3}))
    finally:
        rolled.set()
        asking.join()
    assert set(answers) == {"one", "two"}
    assert answers[-1] == "two"
    assert stack.pids()["router-0"] == envoy
    assert len(next(w for w in stack.status().workloads if w.name == "web").pods) == 3


def test_only_what_changed_is_touched(stack):
    config = {"volumes": [{"name": "c", "configMap": {"name": "c"}}]}
    stay, go = deployment("stay", server("a"), **config), deployment("go", server("a"))
    stack.up(stay, go, deployment("change", server("a")), config_map("c", key="a"))
    before = stack.pids()
    assert len(stack.up()) <= 2, "a second `up` has nothing to wait for"
    assert stack.pids() == before
    stack.up(stay, deployment("change", server("b")), config_map("c", key="b"), deployment("new", server("a")))
    after = stack.pids()
    assert after["stay-0"] == before["stay-0"]
    assert {name.partition("-")[0] for name in after} == {"stay", "change", "new"}
    assert not set(before["change-0"]) & {pid for pids in after.values() for pid in pids}


def test_a_recreated_deployment_never_has_two_versions(stack):
    spec = {"replicas": 1, "strategy": {"type": "Recreate"}}
    only_one = (
        "import os, socket, time, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
    )
    port = AddressBook()._free_port()
    first = container("python", "-c", only_one, str(port), readinessProbe={"exec": {"command": ["true"]}})
    stack.up(deployment("one", first, spec=spec))
    stack.up(deployment("one", {**first, "env": [{"name": "NEW", "value": "1"}]}, spec=spec))
    assert stack.status().workloads[0].restarts == 0


def test_readiness_and_liveness(stack, eventually):
    stack.up(
        deployment("web", server("a", livenessProbe=probe("/sick"), startupProbe=probe("/", failureThreshold=100)))
    )
    home = stack.state / "pods" / "web-0"
    (home / "unready").touch()
    eventually(lambda: "GET /unready said 503" in stack.status().workloads[0].reason)
    before = stack.pids()
    (home / "unready").unlink()
    eventually(lambda: stack.status().workloads[0].state == "Ready")
    assert stack.pids() == before, "an unready pod is not restarted"
    (home / "sick").touch()
    eventually(lambda: "liveness probe failed: GET /sick said 503" in stack.status().workloads[0].reason)
    (home / "sick").unlink()
    eventually(lambda: stack.status().workloads[0].state == "Ready")
    assert stack.status().workloads[0].restarts >= 1


def test_a_container_that_is_killed_starts_again_at_the_same_port(stack, eventually):
    stack.up(deployment("web", server("a")))
    port, (pid,) = stack.port("web-0", "http"), stack.pids()["web-0"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: stack.status().workloads[0].state == "Ready" and stack.pids()["web-0"] not in ([pid], []))
    assert stack.port("web-0", "http") == port
    assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text == "a"
    assert stack.status().workloads[0].restarts == 1


@pytest.mark.parametrize(
    ("command", "exit_code", "words"),
    [
        (("sh", "-c", "echo 'error: no such model' >&2; exit 2"), 2, "error: no such model"),
        (("false",), 1, "exited 1"),
    ],
)
def test_a_deployment_that_cannot_become_ready_is_told_of(stack, command, exit_code, words):
    with pytest.raises(LocalError, match=words) as failed:
        stack.up(deployment("web", container(*command)))
    assert failed.value.exit_code == exit_code
    assert not stack.processes()


def test_a_failed_update_keeps_what_ran_before(stack):
    good = deployment("web", server("a"))
    stack.up(good)
    before = stack.pids()
    with pytest.raises(LocalError, match="Deployment/bad failed"):
        stack.up(good, deployment("bad", container("sh", "-c", "exit 2")))
    assert stack.pids() == before
    assert {w.name: w.state for w in stack.status().workloads} == {"web": "Ready", "bad": "Stopped"}


def test_grace_is_given_and_ends(stack):
    polite = "import signal, sys, time\ndef end(*_): time.sleep(0.5); print('bye', flush=True); sys.exit()\n"
    rude = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    loop = "print('up', flush=True)\nwhile True: time.sleep(0.1)"
    ready = {"readinessProbe": {"exec": {"command": ["sh", "-c", "grep -q up $LOG"]}, "periodSeconds": 0.1}}

    def pod(name: str, text: str):
        log = [{"name": "LOG", "value": str(stack.state / "logs" / f"{name}-0" / "main.log")}]
        return deployment(name, container("python", "-c", text, env=log, **ready), terminationGracePeriodSeconds=2)

    stack.up(pod("polite", polite + "signal.signal(signal.SIGTERM, end)\n" + loop), pod("rude", rude + loop))
    down(stack.state)
    assert stack.log("polite-0").endswith("bye\n")
    assert not stack.processes()
