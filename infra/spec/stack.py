"""A stack: everything that one `Pulumi.<stack>.yaml` says, as one value whose parts refer to one another only by names that exist."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, Spec
from infra.spec.batch import MOUNT_PATH, Batch
from infra.spec.monitoring import Budget, Monitoring
from infra.spec.platform import Images, NodePool, Platform, Registry, Storage, Tenancy
from infra.spec.routing import Router
from infra.spec.runtimes import Runtime, builtin
from infra.spec.serving import Service
from infra.spec.suits import refuse_unsuited
from infra.spec.training import Training

Severity = Literal["error", "warn", "off"]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that does not exist, with the nearest that do."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.4)
    return f"{kind} {name!r} does not exist; " + (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"there is {', '.join(names) or 'none'}"
    )


def _refuse_twins(key: str, names: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in seen:
            first = f"{key}.{seen[name]}"
            raise Misplaced(f"{name!r} is the name of {first} already; names must differ", key, index, "name")
        seen[name] = index


def _refuse_taken(names: Iterable[str]) -> None:
    """Names of services become names of objects, some of which the platform itself makes."""
    for index, name in enumerate(names):
        if name == "router" or name.endswith("-pods") or name.startswith("keep-"):
            raise Misplaced(
                f"a service cannot be called {name!r}: the platform makes an object of that name; choose another",
                *("services", index, "name"),
            )


class Stack(Spec):
    platform: Platform
    """Where it runs."""
    images: Images = Images()
    """Container images."""
    node_pools: tuple[NodePool, ...] = Field(min_length=1)
    """Machines to run on."""
    storage: Storage = Storage()
    """Volumes."""
    registry: Registry = Registry()
    """Where models are kept."""
    tenancy: Tenancy = Tenancy()
    """Limits of the namespace."""
    training: Training | None = None
    """What is trained; null: nothing, the services use what the registry has."""
    services: tuple[Service, ...] = ()
    """What is served."""
    runtimes: tuple[Runtime, ...] = ()
    """Serving runtimes besides those that come with Slipway; one of the same name takes its place."""
    batches: tuple[Batch, ...] = ()
    """What is answered without a server."""
    router: Router = Router()
    """What stands before the services."""
    monitoring: Monitoring = Monitoring()
    """Metrics, alerts, dashboards."""
    budget: Budget = Budget()
    """What it may cost."""
    checks: dict[str, Severity] = Field(default={})
    """Severity of each finding by its code: `SLW701: error`."""

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        _refuse_twins("node_pools", (pool.name for pool in self.node_pools))
        _refuse_twins("services", (service.name for service in self.services))
        _refuse_twins("batches", (batch.name for batch in self.batches))
        _refuse_taken(service.name for service in self.services)
        pools = [pool.name for pool in self.node_pools]
        users: list[tuple[str, tuple[str | int, ...]]] = [
            (service.pool, ("services", index, "pool")) for index, service in enumerate(self.services)
        ]
        users += [(batch.pool, ("batches", index, "pool")) for index, batch in enumerate(self.batches)]
        if self.training:
            users.append((self.training.pool, ("training", "pool")))
        for pool, keys in users:
            if pool not in pools:
                raise Misplaced(unknown("node pool", pool, pools), *keys)
        return self

    @model_validator(mode="after")
    def _batches_are_seen(self) -> Self:
        for index, batch in enumerate(self.batches):
            if self.platform.cloud != "local" and (unseen := batch.unseen()):
                key, path = unseen
                says = (
                    f"no pod of a cluster sees {path}; a URL (s3://…), or a path below {MOUNT_PATH} on a volume_claim"
                )
                raise Misplaced(says, "batches", index, key)
        return self

    @model_validator(mode="after")
    def _keda_finds_prometheus(self) -> Self:
        for index, service in enumerate(self.services):
            if service.autoscaling and service.autoscaling.by == "keda" and self.monitoring.prometheus_url is None:
                says = "KEDA asks Prometheus itself; say where it is (monitoring.prometheus_url)"
                raise Misplaced(says, "services", index, "autoscaling", "by")
        return self

    @model_validator(mode="after")
    def _runtimes_suit(self) -> Self:
        _refuse_twins("runtimes", (runtime.name for runtime in self.runtimes))
        known = builtin() | {runtime.name: runtime for runtime in self.runtimes}
        for index, service in enumerate(self.services):
            keys = ("services", index)
            if service.runtime not in known:
                raise Misplaced(unknown("runtime", service.runtime, known), *keys, "runtime")
            trained = self.trains(service) is not None
            refuse_unsuited(service, known[service.runtime], trained=trained, keys=keys)
        return self

    @model_validator(mode="after")
    def _adapters_are_beside_their_base(self) -> Self:
        """A server of adapters alone would never get ready, and one asked for an adapter that is a whole model has none."""
        if self.training is None:
            return self
        makes, name = self.training.exports_adapters, self.training.name
        for kind, users in (("services", self.services), ("batches", self.batches)):
            for index, user in enumerate(users):
                if makes and user.model == name:
                    says = f"training.lora.export is adapters, and {name!r} no model by itself; name its base, or export: merged"
                    raise Misplaced(says, kind, index, "model")
        for index, service in enumerate(self.services):
            for number, adapter in enumerate(service.adapters):
                if adapter.model == name and not makes:
                    says = f"the training makes {name!r} a whole model; set training.lora.export: adapters"
                    raise Misplaced(says, "services", index, "adapters", number, "model")
        return self

    def runtime(self, service: Service) -> Runtime:
        """What answers behind `service`: the stack's own row of that name, else the one that comes with Slipway."""
        own = {runtime.name: runtime for runtime in self.runtimes}
        return own.get(service.runtime) or builtin()[service.runtime]

    def pool(self, name: str) -> NodePool:
        """The node pool called `name`, which exists (validated)."""
        return next(pool for pool in self.node_pools if pool.name == name)

    def trains(self, service: Service) -> Training | None:
        """The training of this stack that makes the model which `service` serves, if it is this stack's."""
        return self.training if self.training and self.training.name == service.model else None


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a whole `Pulumi.<stack>.yaml`, for editors and for `slipway schema`."""
    parts = Stack.model_json_schema()
    prefix = "slipway:"
    required = [prefix + key for key in parts.pop("required")]
    definitions = parts.pop("$defs")
    properties = {prefix + key: value for key, value in parts.pop("properties").items()}
    # Keys of other namespaces (`aws:region`) may stand beside ours; of ours, only those that exist.
    names = {"anyOf": [{"enum": sorted(properties)}, {"not": {"pattern": f"^{prefix}"}}]}
    config = {"type": "object", "properties": properties, "required": required, "propertyNames": names}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Slipway stack",
        "type": "object",
        "properties": {"config": config},
        "required": ["config"],
        "$defs": definitions,
    }
