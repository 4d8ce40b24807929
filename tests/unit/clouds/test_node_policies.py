"""The rules that network policies become: what they let pass, judged packet by packet by a reading of the ruleset itself."""

import re
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from infra.clouds.local.agent import pod_of
from infra.clouds.local.policies import Pod, ruleset, selected
from infra.render import render

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]


def passes(rules: str, source: str, target: str, port: int, protocol: str = "tcp") -> bool:
    """Whether a new connection between two addresses gets through both of the ruleset's ways."""
    ways = (("leaving", f"ip saddr {source} jump "), ("arriving", f"ip daddr {target} jump "))
    for way, prefix in ways:
        for line in chain(rules, way):
            if line.startswith(prefix) and not any(
                matches(rule, source, target, port, protocol) for rule in chain(rules, line.removeprefix(prefix))
            ):
                return False
    return True


def chain(rules: str, name: str) -> list[str]:
    found = re.search(rf"chain {re.escape(name)} {{\n(.*?)  }}\n", rules, re.DOTALL)
    assert found, name
    return [line.strip() for line in found[1].splitlines()]


def matches(rule: str, source: str, target: str, port: int, protocol: str) -> bool:
    if not rule.endswith("return"):
        return False
    ends = {"saddr": source, "daddr": target}
    for end, address in re.findall(r"ip (saddr|daddr) (\d+\.\d+\.\d+\.\d+)(?:/32)?(?: |$)", rule):
        if ends[end] != address:
            return False
    if asked := re.search(r"(tcp|udp) dport (\d+)(?:-(\d+))?", rule):
        return asked[1] == protocol and int(asked[2]) <= port <= int(asked[3] or asked[2])
    return True


def pod(ip: str, namespace: str = "a", **labels: str) -> Pod:
    return Pod(namespace=namespace, labels=labels, ip=ip, ports={"http": ("tcp", 8000)})


def policy(spec: Json, namespace: str = "a") -> Json:
    return {"metadata": {"name": "p", "namespace": namespace}, "spec": spec}


NAMESPACES = {"a": {"team": "one"}, "b": {"team": "two"}}


def test_without_a_policy_everything_passes() -> None:
    assert passes(ruleset([pod("10.0.0.1"), pod("10.0.0.2")], NAMESPACES, []), "10.0.0.1", "10.0.0.2", 80)


def test_a_selected_pod_is_closed_and_others_are_open() -> None:
    deny = policy({"podSelector": {"matchLabels": {"app": "x"}}, "policyTypes": ["Ingress"]})
    rules = ruleset([pod("10.0.0.1", app="x"), pod("10.0.0.2"), pod("10.0.0.3", "b", app="x")], NAMESPACES, [deny])
    assert not passes(rules, "10.0.0.2", "10.0.0.1", 80)
    assert passes(rules, "10.0.0.1", "10.0.0.2", 80)
    assert passes(rules, "10.0.0.2", "10.0.0.3", 80), "a policy is its namespace's alone"


def test_a_named_port_is_what_the_receiving_pod_calls_so() -> None:
    rule: Json = {"ports": [{"port": "http", "protocol": "TCP"}]}
    to = policy({"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule | {"to": [{"podSelector": {}}]}]})
    rules = ruleset([pod("10.0.0.1"), pod("10.0.0.2")], NAMESPACES, [to])
    assert passes(rules, "10.0.0.1", "10.0.0.2", 8000)
    assert not passes(rules, "10.0.0.1", "10.0.0.2", 8001)


def test_a_namespace_is_chosen_by_its_labels() -> None:
    peer = {"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "In", "values": ["two"]}]}}
    into = policy({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [peer]}]})
    rules = ruleset([pod("10.0.0.1"), pod("10.0.0.2"), pod("10.0.0.3", "b")], NAMESPACES, [into])
    assert passes(rules, "10.0.0.3", "10.0.0.1", 80)
    assert not passes(rules, "10.0.0.2", "10.0.0.1", 80)


def test_a_range_of_ports() -> None:
    rule = {"ports": [{"port": 100, "endPort": 200}]}
    rules = ruleset([pod("10.0.0.1")], NAMESPACES, [policy({"podSelector": {}, "ingress": [rule]})])
    assert [passes(rules, "10.9.9.9", "10.0.0.1", port) for port in (99, 100, 200, 201)] == [False, True, True, False]


def test_an_exception_from_a_block_is_written_for_the_end_that_it_is_about() -> None:
    block = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}
    spec = {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [block]}]}
    rules = ruleset([pod("10.0.0.1")], NAMESPACES, [policy(spec)])
    assert "ip daddr 10.0.0.0/8 ip daddr != { 10.1.0.0/16 } return" in rules


@given(
    st.dictionaries(st.sampled_from("xyz"), st.sampled_from("12"), max_size=3),
    st.sampled_from("xyz"),
    st.sets(st.sampled_from("12"), min_size=1).map(sorted),
)
def test_an_operator_and_its_opposite_never_agree(labels: dict[str, str], key: str, values: list[str]) -> None:
    def holds(operator: str) -> bool:
        return selected({"matchExpressions": [{"key": key, "operator": operator, "values": values}]}, labels)

    assert holds("In") != holds("NotIn")
    assert holds("Exists") != holds("DoesNotExist")


def test_the_dev_stack_has_its_flows_and_no_others() -> None:
    """The policies that Slipway renders, read by the rules that the local cluster makes of them."""
    manifests = render(ROOT / "stacks" / "Pulumi.dev.yaml", None).manifests
    workloads = [m for m in manifests if m["kind"] in ("Deployment", "Job")]
    pods = [pod_of(as_pod(workload, index)) for index, workload in enumerate(workloads, start=1)]
    by_component = {one.labels["app.kubernetes.io/component"]: one for one in pods if one}
    stranger = Pod(namespace="other", labels={}, ip="10.0.9.9")
    dns = Pod(namespace="kube-system", labels={"k8s-app": "kube-dns"}, ip="10.0.9.1")
    names = ("slipway-dev", "other", "kube-system")
    namespaces = {name: {"kubernetes.io/metadata.name": name} for name in names}
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    rules = ruleset([*by_component.values(), stranger, dns], namespaces, policies)
    router, server = by_component["router"].ip, by_component["serve"].ip
    assert passes(rules, router, server, 8000)
    assert passes(rules, router, dns.ip, 53, "udp")
    assert not passes(rules, stranger.ip, server, 8000)
    assert not passes(rules, stranger.ip, router, 10000)
    assert not passes(rules, by_component["train"].ip, server, 8000)
    assert not passes(rules, server, stranger.ip, 443)


def as_pod(workload: Json, index: int) -> Json:
    template = yaml.safe_load(yaml.safe_dump(workload["spec"]["template"]))
    metadata = template["metadata"] | {"namespace": workload["metadata"]["namespace"]}
    return {"metadata": metadata, "spec": template["spec"], "status": {"podIP": f"10.0.1.{index}", "phase": "Running"}}
