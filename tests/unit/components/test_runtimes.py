"""Serving runtimes: the table against what each documents of itself; whatever answers, the rest of the platform is the same."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.components.recordings import relabelings
from infra.components.server import command
from infra.spec import StackError
from infra.spec.runtimes import PLACEHOLDERS, Runtime, builtin
from serving import offline
from serving import settings as server_settings

from .conftest import Json, Objects

FACTS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "runtime_facts.toml").read_text())
OTHERS = sorted(FACTS)
KINDS = {"_total": "counter", "_seconds": "histogram", "_ratio": "gauge", "_running": "gauge", "_waiting": "gauge"}
ASKED = {
    "vllm": {"gpus": 1},
    "sglang": {"gpus": 1},
    "triton": {"gpus": 1, "api": "kserve"},
    "tensorflow-serving": {"gpus": 0, "api": "tensorflow"},
    "onnx": {"gpus": 0},
    "slipway": {"gpus": 1},
}

PLAIN: dict[str, Objects] = {}
"""Renders that several tests read, by runtime."""


def service(runtime: str, **keys: Any) -> Json:
    """A service that `runtime` can answer for."""
    base = {"name": "chat", "model": "base", "pool": "serve", "runtime": runtime, "load_s": 60}
    scaling = {"min_replicas": 2, "max_replicas": 4, "target_in_flight": 6, "scale_down_after_s": 600}
    return base | {"autoscaling": scaling, "resources": {"cpus": 3, "memory_gib": 24}} | ASKED.get(runtime, {}) | keys


@pytest.fixture
def served(rendered: Callable[..., Objects]) -> Callable[..., Objects]:
    """`served("vllm")`: prod with one service of that runtime and nothing trained."""

    def render(runtime: str, *, stack: Json | None = None, **keys: Any) -> Objects:
        changes = {
            "services": [service(runtime, **keys)],
            "training": None,
            "checks": {"SLW306": "off", "SLW701": "off"},
        }
        if stack or keys:
            return rendered("prod", changes | (stack or {}))
        if runtime not in PLAIN:
            PLAIN[runtime] = rendered("prod", changes)
        return PLAIN[runtime]

    return render


def server(objects: Objects) -> Json:
    return objects.one("Deployment", "chat")["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", OTHERS)
def test_rows_say_what_the_runtimes_document(name: str) -> None:
    row, facts = builtin()[name], FACTS[name]
    assert list(row.command[: len(facts["program"])]) == facts["program"]
    flags = {flag.rstrip("=") for flag in row.flags} | {word for word in row.command if word.startswith("--")}
    assert flags <= set(facts["flags"])
    paths = {path.format(served_name="NAME") for path in (row.live, row.ready, row.metrics.path)}
    assert paths <= set(facts["paths"])
    assert all(any(known.startswith(path.rstrip("/")) for known in facts["paths"]) for path in row.paths)
    assert row.metrics.port == facts.get("metrics_port")
    if "{port}" not in " ".join(row.flags.values()):
        assert row.port == facts["port"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_row_drains_only_where_the_runtime_documents_how(name: str) -> None:
    """Else what waits before SIGTERM is the whole drain, and a stream is not cut by a server that was told to go."""
    row, by = builtin()[name], FACTS[name].get("drains_by")
    assert row.drains == (by is not None)
    assert all("{drain_s}" in value for flag, value in row.flags.items() if flag.rstrip("=") in (by or ()))
    assert set(by or ()) <= {flag.rstrip("=") for flag in row.flags}


@pytest.mark.parametrize("name", OTHERS)
def test_probes_are_answered_within_the_routers_second(name: str) -> None:
    wanted = FACTS[name].get("probe_env", {})
    assert wanted.items() <= builtin()[name].env.items()


@pytest.mark.parametrize("name", OTHERS)
def test_a_metric_is_renamed_to_one_of_the_same_kind_and_unit(name: str) -> None:
    for ours, theirs in builtin()[name].metrics.names.items():
        kind = next(kind for end, kind in KINDS.items() if ours.endswith(end))
        # Other units would be silently wrong: none but base units is a plain rename.
        assert FACTS[name]["metrics"][theirs] in (kind, f"{kind}, 1 is 100 percent"), theirs


def test_a_histogram_is_renamed_with_all_its_series_and_nothing_else_is() -> None:
    def renamed(name: str) -> str:
        for rule in relabelings(builtin()["vllm"]):
            # Prometheus anchors a relabelling's expression at both ends.
            if match := re.fullmatch(rule["regex"], name):
                return rule["replacement"].replace("$1", match[1] or "")
        return name

    assert renamed("vllm:num_requests_waiting") == "slipway_serve_requests_waiting"
    assert renamed("vllm:time_to_first_token_seconds_bucket") == "slipway_serve_ttft_seconds_bucket"
    assert renamed("vllm:time_to_first_token_seconds_count") == "slipway_serve_ttft_seconds_count"
    assert renamed("vllm:time_to_first_token_seconds_created") == "vllm:time_to_first_token_seconds_created"
    assert renamed("vllm:e2e_request_latency_seconds_sum") == "vllm:e2e_request_latency_seconds_sum"


@pytest.mark.parametrize("name", sorted(ASKED))
def test_any_runtime_has_the_whole_platform(served: Callable[..., Objects], name: str) -> None:
    objects, row = served(name), builtin()[name]
    pod = objects.one("Deployment", "chat")["spec"]["template"]["spec"]
    container = server(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == row.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "http"
    assert container["readinessProbe"]["httpGet"]["path"] == row.ready.format(served_name="base")
    # Out of the endpoints first; then, where SIGTERM would cut streams, the drain is waited for before it.
    stays_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert stays_s == (8 if row.drains else 68)
    assert pod["terminationGracePeriodSeconds"] > max(60, stays_s)
    assert not re.search(r"[{}]", " ".join(container["command"]))
    monitor = objects.one("ServiceMonitor", "chat")["spec"]["endpoints"][0]
    assert monitor["port"] in ports
    assert monitor["path"] == row.metrics.path
    assert objects.one("PodDisruptionBudget", "chat")
    assert objects.one("NetworkPolicy", "services-answer-router")
    (metric,) = objects.one("HorizontalPodAutoscaler", "chat")["spec"]["metrics"]
    said = metric["pods" if row.counts_in_flight else "external"]
    assert said["metric"]["name"] == "slipway_serve_requests_in_flight"
    assert said["target"] == {"type": "AverageValue", "averageValue": "6"}


@pytest.mark.parametrize("name", sorted(ASKED))
def test_alerts_and_dashboards_name_no_runtime(served: Callable[..., Objects], name: str) -> None:
    objects, row = served(name), builtin()[name]
    groups = {group["name"]: group["rules"] for group in objects.one("PrometheusRule", "objectives")["spec"]["groups"]}
    alerts = {rule["alert"]: rule["expr"] for rule in groups["slipway-chat"]}
    (board,) = [c for c in objects.kind("ConfigMap") if c["metadata"]["name"].startswith("slipway-serving")]
    shown = next(iter(board["data"].values()))
    for theirs in row.metrics.names.values():
        assert theirs not in shown + " ".join(alerts.values())
    assert {"SlipwayErrorBudgetBurning", "SlipwayNoReplicaReady", "SlipwayAtMaxReplicas"} <= alerts.keys()
    assert ("SlipwayTimeToFirstTokenHigh" in alerts) == row.emits("slipway_serve_ttft_seconds")
    recorded = {rule["record"] for rule in groups.get("slipway-chat-metrics", [])}
    used = set(re.findall(r"slipway_serve_\w+", " ".join(alerts.values()) + shown))
    given = recorded | row.metrics.names.keys()
    if not row.is_own:
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} <= given


@pytest.mark.parametrize("name", sorted(ASKED))
def test_the_router_shows_what_the_runtime_answers_and_asks_whether_it_is_ready(
    served: Callable[..., Objects], name: str
) -> None:
    row = builtin()[name]
    config = yaml.safe_load(served(name).one("ConfigMap", "router")["data"]["envoy.yaml"])["static_resources"]
    cluster = config["clusters"][0]
    address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert address == {"address": "chat-pods", "port_value": row.port}
    health = cluster["health_checks"][0]["http_health_check"]["path"]
    assert health == row.ready.format(served_name="base")
    # Who answers on after SIGTERM is asked until it says no; who does not is forgotten before, while preStop waits.
    assert cluster["ignore_health_on_host_removal"] == (not row.is_own)
    manager = config["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    passed = [r for r in manager["route_config"]["virtual_hosts"][0]["routes"] if "route" in r]
    assert [r["match"]["prefix"] for r in passed] == [
        prefix + path.removeprefix("/") for prefix in ("/chat/", "/") for path in row.paths
    ]
    assert [r["route"].get("prefix_rewrite") for r in passed][: len(row.paths)] == list(row.paths)


def test_a_runtime_that_does_not_know_the_registry_finds_the_model_copied(served: Callable[..., Objects]) -> None:
    pod = served("vllm").one("Deployment", "chat")["spec"]["template"]["spec"]
    (copy,) = pod["initContainers"]
    channel = "s3://acme-slipway-prod/models/base/channels/production.json"
    assert copy["command"] == ["python", "-m", "serving.pull", channel, "/models/package"]
    container = pod["containers"][0]
    assert container["command"][:3] == ["vllm", "serve", "/models/package"]
    assert container["image"].startswith("docker.io/vllm/vllm-openai:")
    mounted = [{mount["mountPath"] for mount in c["volumeMounts"]} for c in (copy, container)]
    assert all("/models" in paths for paths in mounted)
    assert "initContainers" not in served("slipway").one("Deployment", "chat")["spec"]["template"]["spec"]


def test_what_the_service_says_reaches_the_runtime_and_what_it_does_not_say_is_left_out(
    served: Callable[..., Objects],
) -> None:
    words = server(served("vllm", kv_gib=2, max_num_seqs=33, dtype="bfloat16"))["command"]
    said = dict(zip(words[3::2], words[4::2], strict=True))
    assert said["--kv-cache-memory-bytes"] == str(2 << 30)
    assert said["--max-num-seqs"] == "33"
    assert said["--dtype"] == "bfloat16"
    assert said["--served-model-name"] == "base"
    assert said["--port"] == "$(HTTP_PORT)"
    assert "--max-model-len" not in said


def test_a_share_of_memory_is_told_in_each_runtimes_own_measure(served: Callable[..., Objects]) -> None:
    """What the plan says is what runs: nobody is told a share of his own meaning, as `--gpu-memory-utilization` is."""
    said: dict[str, int] = {}
    for runtime, flag in (
        ("slipway", "--kv-bytes"),
        ("vllm", "--kv-cache-memory-bytes"),
        ("sglang", "--max-total-tokens"),
    ):
        words = server(served(runtime, model="llama3-8b", kv_share=0.5, max_model_len=4096))["command"]
        said[flag] = int(words[words.index(flag) + 1])
    # The half of what is left of an L40S (48 GB) beside 15 GiB of weights.
    assert 10 << 30 < said["--kv-bytes"] == said["--kv-cache-memory-bytes"] < 16 << 30
    # 32 layers, keys and values of 8 heads of 128 in bfloat16: 128 KiB a token.
    assert said["--max-total-tokens"] == said["--kv-bytes"] >> 17


def test_ranks_of_a_replica_share_memory_and_the_cache(served: Callable[..., Objects]) -> None:
    objects = served(
        "vllm",
        stack={"node_pools.1.instance": "g6e.48xlarge"},
        gpus=4,
        kv_gib=8,
        resources={"cpus": 8, "memory_gib": 64},
    )
    container = server(objects)
    assert container["command"][container["command"].index("--kv-cache-memory-bytes") + 1] == str(2 << 30)
    assert container["command"][container["command"].index("--tensor-parallel-size") + 1] == "4"
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_files_of_a_runtime_are_mounted_and_roll_its_pods(served: Callable[..., Objects]) -> None:
    objects = served("tensorflow-serving")
    config = objects.one("ConfigMap", "chat-runtime")
    assert config["immutable"]
    assert "/monitoring/prometheus/metrics" in config["data"]["monitoring.config"]
    words = server(objects)["command"]
    assert "--monitoring_config_file=/runtime/monitoring.config" in words
    assert "--model_base_path=/models/package" in words


OWN_ROW = {
    "name": "ours",
    "image": "ghcr.io/acme/engine:1.2",
    "command": ["engine", "--weights", "{model}"],
    "flags": {"--listen": "{port}", "--slots": "{max_num_seqs}"},
    "port": 7000,
    "ready": "/ok",
    "live": "/ok",
    "metrics": {"names": {"slipway_serve_requests_waiting": "engine_queue"}},
    "source": "https://acme.example/engine",
}


def test_a_stack_adds_a_runtime(served: Callable[..., Objects]) -> None:
    container = server(served("ours", stack={"runtimes": [OWN_ROW]}))
    assert container["image"] == "ghcr.io/acme/engine:1.2"
    assert container["command"] == [
        "engine",
        "--weights",
        "/models/package",
        "--listen",
        "$(HTTP_PORT)",
        "--slots",
        "16",
    ]


def test_a_stacks_own_row_takes_the_place_of_one_that_comes_with_slipway(served: Callable[..., Objects]) -> None:
    row = builtin()["vllm"].model_dump(mode="json") | {"image": "ghcr.io/acme/vllm:pinned"}
    assert server(served("vllm", stack={"runtimes": [row]}))["image"] == "ghcr.io/acme/vllm:pinned"


@pytest.mark.parametrize(
    ("runtime", "keys", "says"),
    [
        ("tensorflow-serving", {"api": "openai"}, "services.0.api: runtime 'tensorflow-serving' speaks TensorFlow's"),
        ("vllm", {"gpus": 0}, "services.0.gpus: runtime 'vllm' computes on GPUs only"),
        ("vllm", {"api_keys_secret": "keys"}, "services.0.api_keys_secret: runtime 'vllm' has no such setting"),
        ("sglang", {"max_queued_tokens": 100}, "services.0.max_queued_tokens: runtime 'sglang' has no such setting"),
        ("triton", {"kv_gib": 4}, "services.0.kv_gib: runtime 'triton' has no such setting"),
        ("triton", {"kv_share": 0.5}, "services.0.kv_gib: runtime 'triton' has no such setting"),
        ("vllm", {"kv_gib": 4, "kv_share": 0.5}, "services.0.kv_share: kv_gib says how large the cache is already"),
        (
            "slipway",
            {"gpus": 2, "adapters": [{"name": "sql", "model": "sql"}]},
            "services.0.adapters: a replica that is split over 2 GPUs takes no adapters",
        ),
        (
            "vllm",
            {"prefix_store": {"secret": "s"}},
            "services.0.prefix_store: runtime 'vllm' keeps its prefixes to itself",
        ),
        ("vllm", {"files_claim": "f"}, "services.0.files_claim: runtime 'vllm' has no such setting"),
        ("vlm", {}, "services.0.runtime: runtime 'vlm' does not exist; did you mean 'vllm'"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused_at_its_line(
    served: Callable[..., Objects], runtime: str, keys: Json, says: str
) -> None:
    with pytest.raises(StackError, match=re.escape(says)):
        served(runtime, **keys)


def test_a_package_is_no_saved_model(rendered: Callable[..., Objects]) -> None:
    keys = {"runtime": "tensorflow-serving", "api": "tensorflow", "pool": "serve", "model": "code-1b", "name": "chat"}
    with pytest.raises(
        StackError, match="loads TensorFlow SavedModels, and the training makes a Hugging Face directory"
    ):
        rendered("prod", {"services": [keys | {"resources": {"cpus": 1, "memory_gib": 4}}]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"command": ["engine", "{modl}"]}, "{modl} stands for nothing"),
        ({"command": ["engine", "{}"]}, "{} stands for nothing"),
        ({"command": ["engine", "{api_keys}"]}, "{api_keys} may stand for nothing, or for several; put it in flags"),
        ({"flags": {"--metrics": "{metrics_port}"}}, "{metrics_port} stands for metrics.port, which is not there"),
        ({"ready": "/v1/{model}"}, "ready: must match"),
        ({"ready": "health"}, "ready: must match"),
        ({"paths": ["v1/"]}, "paths.0: must match"),
        ({"paths": []}, "paths: must have 1 or more items"),
        ({"files": {"../engine.conf": "x"}}, "must match"),
        ({"env": {"A B": "x"}}, "must match"),
        ({"metrics": {"names": {"slipway_serve_ttft_seconds": ""}}}, "must match"),
        ({"metrics": {"names": {"slipway_serve_ttft": "x"}}}, "'slipway_serve_ttft' is no metric"),
    ],
)
def test_a_row_that_cannot_work_is_refused(rendered: Callable[..., Objects], change: Json, says: str) -> None:
    with pytest.raises(StackError, match=re.escape(says)):
        rendered("local", {"runtimes": [OWN_ROW | change]})


def test_a_flag_of_several_values_is_said_once_for_each_with_all_that_stands_around_it() -> None:
    row = Runtime.model_validate(OWN_ROW | {"flags": {"--lora": "{adapters}@{port}", "--key=": "{api_keys}"}})
    values = dict.fromkeys(PLACEHOLDERS) | {"model": "m", "adapters": ("a=1", "b=2"), "port": 80}
    assert command(row, values)[3:] == ["--lora", "a=1@80", "--lora", "b=2@80"]


def test_every_placeholder_has_a_value() -> None:
    """A row may use any of them; the renderer must know them all."""
    flags = {f"--{name}": f"{{{name}}}" for name in PLACEHOLDERS}
    row = Runtime.model_validate(OWN_ROW | {"flags": flags, "metrics": {"port": 8002}})
    values: dict[str, str | int | None] = dict.fromkeys(PLACEHOLDERS, "value")
    assert command(row, values | {"kv_tokens": None})[3:] == [
        word for name in PLACEHOLDERS if name != "kv_tokens" for word in (f"--{name}", "value")
    ]


@pytest.mark.parametrize("name", ["slipway", "onnx"])
def test_the_own_server_takes_every_flag_of_its_rows(name: str) -> None:
    """With all that a service can say; the programs meet in their command lines."""
    row = builtin()[name]
    values: dict[str, Any] = dict.fromkeys(PLACEHOLDERS, 8) | {
        "model": "s3://registry/models/base/channels/production.json",
        "adapters": ("sql=s3://registry/models/sql/channels/production.json",),
        "dtype": "bfloat16",
        "quantize": "int8",
        "attention": "sdpa",
        "gpus": None,
        "admin_host": "127.0.0.1",
    }
    words = command(row, values)
    assert words[:3] == ["python", "-m", "serving"]
    asked = server_settings.parse(words[3:])
    assert (asked.model, asked.max_num_seqs, asked.admin_port, asked.kv_bytes) == (values["model"], 8, 8, 8)


def test_the_batch_program_takes_every_word_of_its_job(rendered: Callable[..., Objects]) -> None:
    batch = {
        "name": "reviews", "input": "s3://a/in", "output": "s3://a/out", "model": "code-1b", "pool": "serve", "gpus": 2,
        "resources": {"cpus": 3, "memory_gib": 24}, "shards": 3, "max_model_len": 512, "dtype": "bfloat16", "kv_gib": 2,
    }  # fmt: skip
    stack = rendered("prod", {"batches": [batch], "node_pools.1.instance": "g6e.48xlarge", "checks": {"SLW701": "off"}})
    (container,) = stack.one("Job", "batch-reviews")["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "serving.offline"]
    own, asked = offline.parse(container["command"][3:])
    assert (own.input, own.output, own.shards, own.endpoint) == ("s3://a/in", "s3://a/out", 3, "/v1/chat/completions")
    assert (asked.max_model_len, asked.kv_bytes, asked.tensor_parallel_size) == (512, 2 << 30, 2)
    assert (asked.served_name, asked.dtype) == ("code-1b", "bfloat16")
