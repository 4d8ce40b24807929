"""Services: roll-out, probes, drain, budgets, autoscaling; the quota, the network, the monitors."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest

from infra.components.alerts import rule_groups
from infra.live.scrape import INDEX
from infra.spec import StackError, load
from infra.spec.monitoring import AlertName

from .conftest import STACKS, Json, Objects


def server(objects: Objects, name: str = "chat") -> Json:
    return objects.one("Deployment", name)["spec"]["template"]["spec"]["containers"][0]


def flag(container: Json, name: str) -> str:
    return container["command"][container["command"].index(name) + 1]


def test_a_rollout_needs_no_gpu_that_is_not_there(prod: Objects, local: Objects) -> None:
    assert prod.one("Deployment", "chat")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert local.one("Deployment", "chat")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_replicas_are_left_to_the_autoscaler(prod: Objects, local: Objects) -> None:
    assert "replicas" not in prod.one("Deployment", "chat")["spec"]
    assert prod.one("HorizontalPodAutoscaler", "chat")["spec"]["maxReplicas"] == 8
    assert local.one("Deployment", "chat")["spec"]["replicas"] == 2
    assert local.kind("HorizontalPodAutoscaler") == []


def test_scaling_follows_a_signal_without_a_ceiling(prod: Objects) -> None:
    spec = prod.one("HorizontalPodAutoscaler", "chat")["spec"]
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "slipway_serve_requests_in_flight"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "24"}
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300


def test_a_pod_that_waits_for_its_model_is_not_killed(stack: Objects) -> None:
    container = server(stack)
    assert container["startupProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def test_the_startup_budget_follows_the_estimate(rendered: Callable[..., Objects]) -> None:
    def budget(load_s: int) -> int:
        probe = server(rendered("local", {"services.0.load_s": load_s}))["startupProbe"]
        return probe["periodSeconds"] * probe["failureThreshold"]

    assert budget(20) >= 2 * 20
    assert budget(600) >= 2 * 600


def test_streams_have_their_drain_before_the_kill(stack: Objects) -> None:
    pod = stack.one("Deployment", "chat")["spec"]["template"]["spec"]
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before > 0
    stays = sum(int(flag(pod["containers"][0], name)) for name in ("--linger-s", "--drain-s"))
    assert pod["terminationGracePeriodSeconds"] > before + stays


def test_the_router_outlives_the_streams_of_its_services(stack: Objects) -> None:
    router = stack.one("Deployment", "router")["spec"]["template"]["spec"]
    sleep = router["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep > int(flag(server(stack), "--drain-s"))
    assert router["terminationGracePeriodSeconds"] > sleep


def test_budgets_can_always_be_satisfied(stack: Objects) -> None:
    for budget in stack.kind("PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in budget["spec"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_cache_is_given_in_bytes(prod: Objects) -> None:
    assert flag(server(prod), "--kv-bytes") == str(24 * 2**30)


def test_servers_follow_the_channel_that_the_gate_moves(stack: Objects) -> None:
    publish = stack.one("Job", "promote")["spec"]["template"]["spec"]["containers"][0]["command"]
    said = dict(word.split("=", 1) for word in publish if "=" in word)
    url = f"{said['registry']}/models/{said['name']}/channels/{said['channel']}.json"
    assert server(stack)["command"][3] == url
    assert flag(server(stack), "--served-name") == said["name"]


def test_threads_follow_the_limit(stack: Objects) -> None:
    variable = next(v for v in server(stack)["env"] if v["name"] == "OMP_NUM_THREADS")
    assert variable["valueFrom"]["resourceFieldRef"] == {"resource": "limits.cpu", "divisor": "1"}


def test_replicas_spread_and_never_stay_pending_for_it(stack: Objects) -> None:
    constraints = stack.one("Deployment", "chat")["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert {c["topologyKey"] for c in constraints} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
    assert {c["whenUnsatisfiable"] for c in constraints} == {"ScheduleAnyway"}


def test_the_quota_is_what_the_pools_can_hold(prod: Objects, rendered: Callable[..., Objects]) -> None:
    key = "requests.nvidia.com/gpu"
    assert prod.one("ResourceQuota", "quota")["spec"]["hard"][key] == str(2 * 8 + 9)
    assert rendered("prod", {"tenancy.quota": {"gpus": 20}}).one("ResourceQuota", "quota")["spec"]["hard"][key] == "20"


def matching(stack: Objects, selector: dict[str, Any]) -> list[Json]:
    wanted = selector.get("matchLabels", {}).items()
    return [pod for pod in stack.pods() if wanted <= pod["metadata"]["labels"].items()]


def test_the_network_denies_what_no_policy_allows(stack: Objects) -> None:
    spec = stack.one("NetworkPolicy", "default-deny")["spec"]
    assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_policies_are_about_pods_and_ports_that_exist(stack: Objects) -> None:
    for policy in stack.kind("NetworkPolicy"):
        spec, name = policy["spec"], policy["metadata"]["name"]
        pods = matching(stack, spec["podSelector"])
        assert pods, name
        for rule in spec.get("ingress", []):
            for port in rule.get("ports", []):
                assert all(port["port"] in names(pod) for pod in pods), name
        for rule in spec.get("egress", []):
            for peer in (p for p in rule.get("to", []) if "podSelector" in p and "namespaceSelector" not in p):
                reached = matching(stack, peer["podSelector"])
                assert reached, name
                assert all(port["port"] in names(pod) for pod in reached for port in rule.get("ports", [])), name


def names(pod: Json) -> set[str]:
    return {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}


def test_the_internet_is_only_for_pods_that_open_an_object_store(prod: Objects, local: Objects) -> None:
    assert {n for n in prod.names("NetworkPolicy") if "object-store" in n} == {
        f"{component}-reaches-object-store" for component in ("data", "promote", "serve")
    }
    assert not any("object-store" in name for name in local.names("NetworkPolicy"))
    spec = prod.one("NetworkPolicy", "serve-reaches-object-store")["spec"]["egress"][0]
    assert spec["to"][0]["ipBlock"]["except"] == ["169.254.169.254/32"]


def test_a_session_store_is_told_by_reference_and_reached_by_its_service_alone(
    rendered: Callable[..., Objects],
) -> None:
    inside = {"services.0.session_store": {"secret": "chat-store", "namespace": "stores"}}
    stack = rendered("prod", inside)
    server = stack.one("Deployment", "chat")["spec"]["template"]["spec"]["containers"][0]
    (variable,) = (v for v in server["env"] if v["name"] == "SESSION_STORE_URL")
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "chat-store", "key": "url"}}
    assert not any("SESSION_STORE" in word or "--session-store" in word for word in server["command"])
    spec = stack.one("NetworkPolicy", "chat-reaches-session-store")["spec"]
    assert [
        pod["metadata"]["labels"]["app.kubernetes.io/instance"] for pod in matching(stack, spec["podSelector"])
    ] == ["chat"]
    (rule,) = spec["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 6379}]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "stores"}}}]
    outside = rendered("prod", {"services.0.session_store": {"secret": "chat-store", "port": 6380}})
    (rule,) = outside.one("NetworkPolicy", "chat-reaches-session-store")["spec"]["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 6380}]
    assert rule["to"][0]["ipBlock"]["except"] == ["169.254.169.254/32"]
    with pytest.raises(StackError, match=r"session_store: runtime 'vllm' has no chat page"):
        rendered("prod", inside | {"services.0.runtime": "vllm", "services.0.api_keys_secret": None})


def test_prefixes_and_spans_go_where_the_stack_says(rendered: Callable[..., Objects]) -> None:
    stack = rendered(
        "prod",
        {
            "services.0.prefix_store": {"secret": "prefixes", "namespace": "stores"},
            "monitoring.collector": {"url": "http://collector.observability:4318", "namespace": "observability"},
        },
    )
    variables = {v["name"]: v for v in server(stack)["env"]}
    assert variables["KV_SPILL_URL"]["valueFrom"] == {"secretKeyRef": {"name": "prefixes", "key": "url"}}
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"]["value"] == "http://collector.observability:4318"
    assert variables["OTEL_SERVICE_NAME"]["value"] == "chat"
    for policy, namespace, port in (
        ("chat-reaches-prefix-store", "stores", 6379),
        ("serve-reaches-collector", "observability", 4318),
    ):
        (rule,) = stack.one("NetworkPolicy", policy)["spec"]["egress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
        assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}]


def test_what_the_engine_is_told_on_a_cpu(rendered: Callable[..., Objects]) -> None:
    asked = {"quantize": "int8", "speculate_tokens": 4, "spill_gib": 0.25, "files_claim": "batches"}
    found = rendered("local", {f"services.0.{key}": value for key, value in asked.items()})
    told = server(found)
    flags = ("--quantize", "--speculate-tokens", "--kv-spill", "--files-dir")
    assert [flag(told, name) for name in flags] == ["int8", "4", str(2**28), "/files"]
    assert "--attention" not in told["command"]
    assert {"name": "batches", "mountPath": "/files"} in told["volumeMounts"]
    plain, narrow = (
        stack.rendered.outputs["plan"]["services"][0]["memory"]["parts"] for stack in (rendered("local", {}), found)
    )
    assert narrow["weights"] < plain["weights"]
    assert narrow["spilled prefixes"] == 0.25


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantize": "int4"}, r"quantize: on a GPU these weights would be widened again"),
        ({"gpus": 2, "spill_gib": 1.0}, r"spill_gib: a replica that is split over 2 GPUs"),
        ({"gpus": 2, "prefix_store": {"secret": "s"}}, r"prefix_store: a replica that is split over 2 GPUs"),
        ({"spill_gib": 1.0, "prefix_store": {"secret": "s"}}, r"spill_gib: prefixes go to prefix_store already"),
        ({"spill_gib": 99.0}, r"spill_gib: 99 is not below resources.memory_gib 24"),
        ({"attention": "flash", "dtype": "float32"}, r"attention: FlashAttention computes on a GPU, in bfloat16"),
    ],
)
def test_what_a_service_cannot_have_is_refused(rendered: Callable[..., Objects], changes: dict, says: str) -> None:
    with pytest.raises(StackError, match=says):
        rendered("prod", {f"services.0.{key}": value for key, value in changes.items()})


def test_who_may_call_the_router(rendered: Callable[..., Objects]) -> None:
    inside = rendered("prod", {"router.expose": "ClusterIP"}).one("NetworkPolicy", "clients-call-router")
    peers = inside["spec"]["ingress"][0]["from"]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}} in peers
    public = rendered("prod", {}).one("NetworkPolicy", "clients-call-router")
    assert "from" not in public["spec"]["ingress"][0]


def test_each_default_can_be_turned_off_by_name(rendered: Callable[..., Objects]) -> None:
    assert rendered("local", {"tenancy.network_policies": False}).kind("NetworkPolicy") == []
    bare = rendered("local", {"monitoring.enabled": False})
    assert bare.kind("PrometheusRule") == bare.kind("ServiceMonitor") == bare.kind("PodMonitor") == []


def test_each_replica_is_scraped_once(stack: Objects) -> None:
    monitor = stack.one("ServiceMonitor", "chat")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    chosen = [s for s in stack.kind("Service") if wanted <= s["metadata"]["labels"].items()]
    assert [s["metadata"]["name"] for s in chosen] == ["chat-pods"]
    assert {e["port"] for e in monitor["endpoints"]} <= {p["name"] for p in chosen[0]["spec"]["ports"]}
    for pod_monitor in stack.kind("PodMonitor"):
        pods = matching(stack, pod_monitor["spec"]["selector"])
        assert pods
        assert all("metrics" in names(pod) for pod in pods)


def test_of_a_gang_the_pod_with_rank_0_is_scraped(prod: Objects) -> None:
    """It alone opens the port: another one would be a target that is always down."""
    (endpoint,) = prod.one("PodMonitor", "training")["spec"]["podMetricsEndpoints"]
    (only,) = endpoint["relabelings"]
    assert (only["action"], only["regex"]) == ("keep", "0")
    assert only["sourceLabels"] == ["__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", INDEX)]


@pytest.mark.parametrize("goal", ["ttft_p95_s", "tpot_p95_s"])
def test_alerts_and_dashboards_hold_the_objectives(rendered: Callable[..., Objects], goal: str) -> None:
    objects = rendered("local", {f"monitoring.objectives.{goal}": 0.321})
    rules = [r for g in objects.one("PrometheusRule", "objectives")["spec"]["groups"] for r in g["rules"]]
    assert any(rule["expr"].endswith("> 0.321") for rule in rules)
    (board,) = [c for c in objects.kind("ConfigMap") if c["metadata"]["name"].startswith("slipway-serving")]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert "0.321" in next(iter(board["data"].values()))


def alerts(objects: Objects) -> dict[str, Any]:
    groups = objects.one("PrometheusRule", "objectives")["spec"]["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def test_every_alert_can_be_switched_off_or_told_when_to_fire(rendered: Callable[..., Objects]) -> None:
    usual = alerts(rendered("prod", {}))
    assert set(usual) == set(get_args(AlertName))
    changes = {"SlipwayJobFailed": {"enabled": False}, "SlipwayNoReplicaReady": {"after_s": 45}}
    changed = alerts(rendered("prod", {"monitoring.alerts": changes}))
    assert set(usual) - set(changed) == {"SlipwayJobFailed"}
    assert changed.pop("SlipwayNoReplicaReady") == usual["SlipwayNoReplicaReady"] | {"for": "45s"}
    assert all(rule == usual[name] for name, rule in changed.items())


def test_without_its_alerts_a_stack_has_no_rules(rendered: Callable[..., Objects]) -> None:
    off = {name: {"enabled": False} for name in get_args(AlertName)}
    assert rendered("prod", {"monitoring.alerts": off}).kind("PrometheusRule") == []


def test_the_autoscalers_limit_is_watched() -> None:
    groups = rule_groups(load(STACKS / "Pulumi.prod.yaml"))
    alert = next(r for g in groups for r in g["rules"] if r["alert"] == "SlipwayAtMaxReplicas")
    assert alert["expr"].endswith(f"> {24 * 8}")


def test_a_stack_may_serve_without_training(rendered: Callable[..., Objects]) -> None:
    objects = rendered("local", {"training": None})
    assert objects.kind("Job") == []
    assert objects.names("Deployment") == {"chat", "router"}


KEYS = {"services.0.api_keys_secret": "chat-keys"}


def test_with_api_keys_metrics_are_read_at_the_admin_port_and_by_prometheus_alone(
    rendered: Callable[..., Objects],
) -> None:
    objects = rendered("dev", KEYS)
    container = server(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "admin": 9000}
    assert flag(container, "--admin-port") == "$(ADMIN_PORT)"
    assert objects.one("ServiceMonitor", "chat")["spec"]["endpoints"][0]["port"] == "admin"
    shown = {s["metadata"]["name"]: [p["name"] for p in s["spec"]["ports"]] for s in objects.kind("Service")}
    assert shown["chat-pods"] == ["http", "admin"]
    assert shown["chat"] == ["http"]
    opened = {
        policy["metadata"]["name"]: rule
        for policy in objects.kind("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        if any(port["port"] == "admin" for port in rule.get("ports", []))
    }
    assert opened.keys() == {"monitoring-scrapes-serve"}
    (peer,) = opened["monitoring-scrapes-serve"]["from"]
    assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def test_hashes_of_keys_are_mounted_from_the_secret_and_stand_in_no_manifest(rendered: Callable[..., Objects]) -> None:
    objects = rendered("dev", KEYS)
    pod = objects.one("Deployment", "chat")["spec"]["template"]["spec"]
    assert flag(pod["containers"][0], "--api-keys") == "/keys/keys.json"
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/keys"]
    assert mount["readOnly"] is True
    assert {"name": "keys", "secret": {"secretName": "chat-keys"}} in pod["volumes"]
    assert objects.kind("Secret") == []


def test_without_keys_there_is_no_admin_port(local: Objects) -> None:
    assert not any(word.startswith("--admin") or word == "--api-keys" for word in server(local)["command"])
    assert local.one("ServiceMonitor", "chat")["spec"]["endpoints"][0]["port"] == "http"


def test_adapters_are_named_by_their_channel_or_their_digest(rendered: Callable[..., Objects]) -> None:
    adapters = [{"name": "sql", "model": "chat-sql"}, {"name": "old", "model": "chat-sql", "digest": "a" * 64}]
    words = server(rendered("prod", {"services.0.adapters": adapters}))["command"]
    said = [word for before, word in pairwise(words) if before == "--adapter"]
    models = "s3://acme-slipway-prod/models/chat-sql"
    assert said == [f"sql={models}/channels/production.json", f"old={models}/{'a' * 64}"]


def test_a_cache_outlives_the_pod(rendered: Callable[..., Objects]) -> None:
    objects = rendered("prod", {"services.0.cache_gib": 50})
    claim = objects.one("PersistentVolumeClaim", "chat-cache")["spec"]
    assert claim["resources"]["requests"] == {"storage": "50Gi"}
    assert claim["accessModes"] == ["ReadWriteMany"]
    container = server(objects)
    assert "/cache" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"name": "XDG_CACHE_HOME", "value": "/cache"} in container["env"]


def test_a_pools_runtime_class_is_that_of_its_pods_and_of_no_others(rendered: Callable[..., Objects]) -> None:
    objects = rendered("prod", {"node_pools.1.runtime_class": "nvidia"})
    assert objects.one("Deployment", "chat")["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in objects.one("Deployment", "router")["spec"]["template"]["spec"]


def test_keda_scales_on_the_same_signal_and_needs_to_know_where_prometheus_is(rendered: Callable[..., Objects]) -> None:
    by_keda = {"services.0.autoscaling.by": "keda"}
    with pytest.raises(StackError, match=r"services\.0\.autoscaling\.by: KEDA asks Prometheus itself"):
        rendered("prod", by_keda)
    objects = rendered("prod", by_keda | {"monitoring": {"prometheus_url": "http://prometheus.monitoring:9090"}})
    assert objects.kind("HorizontalPodAutoscaler") == []
    scaled = objects.one("ScaledObject", "chat")["spec"]
    assert scaled["scaleTargetRef"] == {"name": "chat"}
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 8)
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus.monitoring:9090",
        "query": 'sum(slipway_serve_requests_in_flight{namespace="slipway-prod", inference_service="chat"})',
        "threshold": "24",
    }
    assert scaled["cooldownPeriod"] == 300
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    (kept,) = rendered("prod", {}).kind("HorizontalPodAutoscaler")
    assert behavior == kept["spec"]["behavior"]


def test_none_while_nobody_calls_is_kedas_to_do_and_hears_the_router(rendered: Callable[..., Objects]) -> None:
    none = {"services.0.autoscaling.min_replicas": 0, "services.0.autoscaling.max_replicas": 2}
    with pytest.raises(StackError, match=r"min_replicas: .*by: keda"):
        rendered("prod", none)
    url = {"monitoring": {"prometheus_url": "http://prometheus.monitoring:9090"}}
    objects = rendered("prod", none | url | {"services.0.autoscaling.by": "keda"})
    scaled = objects.one("ScaledObject", "chat")["spec"]
    assert scaled["minReplicaCount"] == 0
    # A Deployment at none stays there under another autoscaler: KEDA leaves one behind when its object goes.
    assert scaled["advanced"]["restoreToOriginalReplicaCount"] is True
    # Who finds no replica is seen at the router alone: by KEDA, and by the alert that would otherwise always fire.
    unserved = "envoy_cluster_upstream_cx_none_healthy"
    assert unserved in scaled["triggers"][0]["metadata"]["query"]
    assert unserved in alerts(objects)["SlipwayNoReplicaReady"]["expr"]
