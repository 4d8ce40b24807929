"""Kubernetes' network policies as one nft ruleset: a pure function of pods, namespaces and policies.

https://kubernetes.io/docs/concepts/services-networking/network-policies/: a pod that no policy selects for a direction is open
in it; one that is selected may do what any of those policies allows, and answers of allowed connections always pass.
What a Service's address stands for is decided before (kube-proxy translates in prerouting), so rules name pods alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
Direction = Literal["ingress", "egress"]
TABLE = "inet slipway"
# Direction → chain of the pods that are closed in it, the pod's own end of a packet, and the other end.
CHAINS: dict[Direction, tuple[str, str, str]] = {
    "egress": ("leaving", "saddr", "daddr"),
    "ingress": ("arriving", "daddr", "saddr"),
}
HOOKS = """\
  chain forward {
    type filter hook forward priority filter; policy accept;
    ct state established,related accept
    jump leaving
    jump arriving
  }
  chain input {
    type filter hook input priority filter; policy accept;
    ct state established,related accept
    jump leaving
  }
"""


@dataclass(frozen=True, kw_only=True)
class Pod:
    namespace: str
    labels: dict[str, str]
    ip: str
    ports: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """Name → protocol (`tcp`), number."""


@dataclass(frozen=True)
class _Match:
    """Traffic that is allowed: to or from `ips` (None: anywhere), at `port` (an nft expression; None: any)."""

    ips: str | None
    port: str | None = None


def ruleset(pods: Sequence[Pod], namespaces: dict[str, dict[str, str]], policies: Sequence[Json]) -> str:
    """Text for `nft -f`, that replaces what the table held at once. `namespaces`: name → labels."""
    chains: list[str] = []
    entries: dict[str, list[str]] = {"leaving": [], "arriving": []}
    for pod in sorted(pods, key=lambda pod: pod.ip):
        for direction, (entry, own, other) in CHAINS.items():
            mine = [policy for policy in policies if _selects(policy, pod, direction)]
            if not mine:
                continue
            name = f"{direction}-{pod.ip.replace('.', '-')}"
            allowed = {m for policy in mine for m in _matches(policy, pod, direction, pods, namespaces)}
            rules = sorted(_rule(match, other) for match in allowed)
            chains.append(_chain(name, [*rules, "drop"]))
            entries[entry].append(f"ip {own} {pod.ip} jump {name}")
    body = "".join([*chains, *(_chain(name, rules) for name, rules in entries.items()), HOOKS])
    return f"table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{body}}}\n"


def selected(selector: Json | None, labels: dict[str, str]) -> bool:
    """Whether a label selector takes `labels`; the empty one takes all."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions", []))


def _holds(expression: Json, labels: dict[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None


def _selects(policy: Json, pod: Pod, direction: Direction) -> bool:
    types = policy["spec"].get("policyTypes") or (["Ingress", "Egress"] if "egress" in policy["spec"] else ["Ingress"])
    same = policy["metadata"]["namespace"] == pod.namespace
    return same and direction.capitalize() in types and selected(policy["spec"].get("podSelector"), pod.labels)


def _matches(
    policy: Json, pod: Pod, direction: Direction, pods: Sequence[Pod], namespaces: dict[str, dict[str, str]]
) -> Iterator[_Match]:
    peers_key = "from" if direction == "ingress" else "to"
    rules: list[Json] = policy["spec"].get(direction) or []
    for rule in rules:
        # A rule without ports means all, one without peers anybody.
        ports: list[Json] = rule.get("ports") or [{}]
        peers: list[Json | None] = rule.get(peers_key) or [None]
        for peer in peers:
            for port in ports:
                yield from _allowed(peer, port, pod, policy["metadata"]["namespace"], direction, pods, namespaces)


def _allowed(
    peer: Json | None,
    port: Json,
    pod: Pod,
    namespace: str,
    direction: Direction,
    pods: Sequence[Pod],
    namespaces: dict[str, dict[str, str]],
) -> Iterator[_Match]:
    """What one peer and one port of a rule allow. A port's name means what the pod calls so that is called."""
    if direction == "ingress" or not isinstance(port.get("port"), str):
        ips = _addresses(peer, namespace, pods, namespaces)
        expression = _port(port, pod)
        if expression != "":
            yield from (_Match(one, expression) for one in ips)
        return
    for other in _peer_pods(peer, namespace, pods, namespaces):
        if expression := _port(port, other):
            yield _Match(other.ip, expression)


def _port(port: Json, pod: Pod) -> str | None:
    """An nft expression; None for any port, empty where the pod has no port of that name."""
    protocol, number = port.get("protocol", "TCP").lower(), port.get("port")
    if number is None:
        return f"meta l4proto {protocol}" if "protocol" in port else None
    if isinstance(number, str):
        named = pod.ports.get(number)
        return f"{protocol} dport {named[1]}" if named and named[0] == protocol else ""
    return f"{protocol} dport {number}-{port['endPort']}" if "endPort" in port else f"{protocol} dport {number}"


def _addresses(
    peer: Json | None, namespace: str, pods: Sequence[Pod], namespaces: dict[str, dict[str, str]]
) -> Iterator[str | None]:
    if peer is None:
        yield None
    elif "ipBlock" in peer:
        block = peer["ipBlock"]
        if ":" not in block["cidr"]:  # the cluster has IPv4 alone
            # The other end is `saddr` or `daddr`: `_rule` fills it in.
            but = f" ip OTHER != {{ {', '.join(block['except'])} }}" if block.get("except") else ""
            yield block["cidr"] + but
    else:
        yield from (pod.ip for pod in _peer_pods(peer, namespace, pods, namespaces))


def _peer_pods(
    peer: Json | None, namespace: str, pods: Sequence[Pod], namespaces: dict[str, dict[str, str]]
) -> Iterable[Pod]:
    if peer is None:
        return pods
    if "ipBlock" in peer:
        return ()
    if "namespaceSelector" in peer:
        there = {name for name, labels in namespaces.items() if selected(peer["namespaceSelector"], labels)}
    else:
        there = {namespace}
    return [pod for pod in pods if pod.namespace in there and selected(peer.get("podSelector"), pod.labels)]


def _rule(match: _Match, other: str) -> str:
    parts = [f"ip OTHER {match.ips}".replace("OTHER", other)] if match.ips else []
    return " ".join([*parts, *([match.port] if match.port else []), "return"])


def _chain(name: str, rules: Sequence[str]) -> str:
    return f"  chain {name} {{\n" + "".join(f"    {rule}\n" for rule in rules) + "  }\n"
