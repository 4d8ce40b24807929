"""Who may talk to whom: nothing, then exactly the flows that the stack needs. Each policy is named after its one purpose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs
from pulumi_kubernetes.networking import v1 as net

from infra.components.common import Scope, component_selector, selector
from infra.spec import Collector, Store

NAMESPACE_NAME = "kubernetes.io/metadata.name"
METADATA_SERVICE = "169.254.169.254/32"
NODE_LOCAL_DNS = "169.254.20.10/32"


@dataclass(frozen=True, kw_only=True)
class NetworkArgs:
    scope: Scope
    trains: bool
    meets: bool
    """Training pods are launches that meet (`local_sgd.launches`)."""
    serves: bool
    stores: Mapping[str, Mapping[str, Store]]
    """What the replicas of services share, by the service's name and what is kept there."""
    collector: Collector | None
    """Where servers send their spans."""
    scraped_ports: Sequence[str]
    """Names of the ports at which replicas are scraped: `admin` where `http` asks for API keys."""
    client_namespaces: Sequence[str]
    """Namespaces whose pods may call the router, besides the stack's own."""
    public: bool
    """The router's Service is of type LoadBalancer: anyone may call it."""
    monitoring_namespace: str | None
    """Namespace that scrapes; None: nobody does."""
    object_store_users: Sequence[str]
    """Components whose pods reach an object store."""


@dataclass(frozen=True, kw_only=True)
class _Flow:
    name: str
    pods: dict[str, str]
    """Labels of the pods that the policy is about; empty for all."""
    ingress: Sequence[net.NetworkPolicyIngressRuleArgs] | None = None
    egress: Sequence[net.NetworkPolicyEgressRuleArgs] | None = None


class Network(pulumi.ComponentResource):
    def __init__(self, name: str, args: NetworkArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Network", name, None, opts)
        for flow in _flows(args):
            types = [kind for kind, rules in (("Ingress", flow.ingress), ("Egress", flow.egress)) if rules is not None]
            net.NetworkPolicy(
                f"{name}-{flow.name}",
                metadata=args.scope.meta(flow.name, component="network"),
                spec=net.NetworkPolicySpecArgs(
                    pod_selector=LabelSelectorArgs(match_labels=flow.pods or None),
                    policy_types=types,
                    ingress=list(flow.ingress) if flow.ingress else None,
                    egress=list(flow.egress) if flow.egress else None,
                ),
                opts=pulumi.ResourceOptions(parent=self),
            )
        self.register_outputs({})


def _flows(args: NetworkArgs) -> list[_Flow]:
    flows = [_Flow(name="default-deny", pods={}, ingress=[], egress=[]), _dns()]
    if args.trains:
        flows.append(_gang())
    if args.meets:
        flows += _meeting()
    if args.serves:
        flows += [*_router_to_services(), _clients(args)]
        flows += [
            _store(service, what, store) for service, stores in args.stores.items() for what, store in stores.items()
        ]
        if args.collector:
            rule = _reach(args.collector.namespace, args.collector.port)
            flows.append(_Flow(name="serve-reaches-collector", pods=component_selector("serve"), egress=[rule]))
    if args.monitoring_namespace:
        flows += _scrapes(args, args.monitoring_namespace)
    return flows + [_object_store(component) for component in args.object_store_users]


def _dns() -> _Flow:
    """Names are resolved by the cluster's DNS (or the node's cache of it) and by nobody else."""
    cluster = net.NetworkPolicyPeerArgs(
        namespace_selector=LabelSelectorArgs(match_labels={NAMESPACE_NAME: "kube-system"}),
        pod_selector=LabelSelectorArgs(match_labels={"k8s-app": "kube-dns"}),
    )
    cache = net.NetworkPolicyPeerArgs(ip_block=net.IPBlockArgs(cidr=NODE_LOCAL_DNS))
    ports = [net.NetworkPolicyPortArgs(protocol=protocol, port=53) for protocol in ("UDP", "TCP")]
    return _Flow(
        name="resolve-names", pods={}, egress=[net.NetworkPolicyEgressRuleArgs(to=[cluster, cache], ports=ports)]
    )


def _gang() -> _Flow:
    """Ranks talk on the rendezvous port and on ephemeral ports of gloo and NCCL: all ports, among training pods only."""
    peers = [_pods("train")]
    return _Flow(
        name="ranks-among-themselves",
        pods=component_selector("train"),
        ingress=[net.NetworkPolicyIngressRuleArgs(from_=peers)],
        egress=[net.NetworkPolicyEgressRuleArgs(to=peers)],
    )


def _meeting() -> list[_Flow]:
    """Launches ask the meeting place, which asks nobody; what they have learnt they tell one another, as ranks do."""
    ask = net.NetworkPolicyEgressRuleArgs(to=[_pods("meet")], ports=_tcp("meeting"))
    answer = net.NetworkPolicyIngressRuleArgs(from_=[_pods("train")], ports=_tcp("meeting"))
    return [
        _Flow(name="launches-call-meeting", pods=component_selector("train"), egress=[ask]),
        _Flow(name="meeting-answers-launches", pods=component_selector("meet"), ingress=[answer]),
    ]


def _router_to_services() -> list[_Flow]:
    """Both ends of one flow: the router may call, the servers may be called."""
    call = net.NetworkPolicyEgressRuleArgs(to=[_pods("serve")], ports=_tcp("http"))
    answer = net.NetworkPolicyIngressRuleArgs(from_=[_pods("router")], ports=_tcp("http"))
    return [
        _Flow(name="router-calls-services", pods=component_selector("router"), egress=[call]),
        _Flow(name="services-answer-router", pods=component_selector("serve"), ingress=[answer]),
    ]


def _clients(args: NetworkArgs) -> _Flow:
    inside = [net.NetworkPolicyPeerArgs(pod_selector=LabelSelectorArgs()), *map(_namespace, args.client_namespaces)]
    rule = net.NetworkPolicyIngressRuleArgs(from_=None if args.public else inside, ports=_tcp("http"))
    return _Flow(name="clients-call-router", pods=component_selector("router"), ingress=[rule])


def _store(service: str, what: str, store: Store) -> _Flow:
    rule = _reach(store.namespace, store.port)
    return _Flow(name=f"{service}-reaches-{what}-store", pods=selector("serve", service), egress=[rule])


def _reach(namespace: str | None, port: int) -> net.NetworkPolicyEgressRuleArgs:
    """To the pods of a namespace, or out of the cluster, at one port."""
    return net.NetworkPolicyEgressRuleArgs(to=[_namespace(namespace) if namespace else _outside()], ports=_tcp(port))


def _scrapes(args: NetworkArgs, namespace: str) -> list[_Flow]:
    ports: dict[str, Sequence[str]] = {}
    if args.trains:
        ports["train"] = ("metrics",)
    if args.serves:
        ports |= {"serve": args.scraped_ports, "router": ("metrics",)}
    return [
        _Flow(
            name=f"monitoring-scrapes-{component}",
            pods=component_selector(component),
            ingress=[net.NetworkPolicyIngressRuleArgs(from_=[_namespace(namespace)], ports=_tcp(*names))],
        )
        for component, names in ports.items()
    ]


def _object_store(component: str) -> _Flow:
    """HTTPS to anywhere."""
    rule = net.NetworkPolicyEgressRuleArgs(to=[_outside()], ports=_tcp(443))
    return _Flow(name=f"{component}-reaches-object-store", pods=component_selector(component), egress=[rule])


def _outside() -> net.NetworkPolicyPeerArgs:
    """Any address but the node's metadata service, whose credentials are the node's."""
    return net.NetworkPolicyPeerArgs(ip_block=net.IPBlockArgs(cidr="0.0.0.0/0", except_=[METADATA_SERVICE]))


def _pods(component: str) -> net.NetworkPolicyPeerArgs:
    return net.NetworkPolicyPeerArgs(pod_selector=LabelSelectorArgs(match_labels=component_selector(component)))


def _namespace(name: str) -> net.NetworkPolicyPeerArgs:
    return net.NetworkPolicyPeerArgs(namespace_selector=LabelSelectorArgs(match_labels={NAMESPACE_NAME: name}))


def _tcp(*ports: int | str) -> list[net.NetworkPolicyPortArgs]:
    return [net.NetworkPolicyPortArgs(protocol="TCP", port=port) for port in ports]
