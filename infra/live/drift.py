"""What of a live stack is not as its file declares: each object as it is beside what applying it would make of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from infra.apply import ApiError, Cluster

Json = dict[str, Any]
OURS = "app.kubernetes.io/part-of=slipway"
INVENTORY = "slipway-inventory-"
# What the API server keeps by itself, and changes at every write.
_KEPT = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")
MOST_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Difference:
    what: str
    """`deployment/chat`."""
    says: str
    """`is missing`, `spec.replicas: 5, declared 2`."""

    def to_json(self) -> Json:
        return asdict(self)


def differences(cluster: Cluster, manifests: Sequence[Json]) -> list[Difference]:
    """Held against a server-side apply that is not carried out. Raises `ApiError` where the cluster does not answer."""
    found = list[Difference]()
    for manifest in manifests:
        what = name_of(manifest)
        try:
            live = cluster.find(manifest)
            if live is None:
                found.append(Difference(what=what, says="is missing"))
                continue
            found += [Difference(what=what, says=said) for said in changes(live, cluster.apply(manifest, dry_run=True))]
        except ApiError as error:
            if error.status == 0:
                raise
            immutable = error.status == 422
            says = (
                "differs in what cannot be changed: it would be made anew"
                if immutable
                else f"cannot be compared: {error}"
            )
            found.append(Difference(what=what, says=says))
    return [*found, *_undeclared(cluster, manifests)]


def changes(live: Json, declared: Json) -> list[str]:
    """`path: live value, declared value` for each leaf that differs; status and what the server keeps are passed over."""
    told = list(_walk(_plain(live), _plain(declared), ""))
    more = len(told) - MOST_SHOWN
    return [*told[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]


def _plain(thing: Json) -> Json:
    metadata = {key: value for key, value in thing["metadata"].items() if key not in _KEPT}
    return {key: value for key, value in thing.items() if key != "status"} | {"metadata": metadata}


def _walk(live: Any, declared: Any, path: str) -> Iterator[str]:
    if live == declared:
        return
    if isinstance(live, dict) and isinstance(declared, dict):
        ours, theirs = cast(Json, live), cast(Json, declared)
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _walk(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif isinstance(live, list) and isinstance(declared, list) and len(cast(Any, live)) == len(cast(Any, declared)):
        for index, (one, other) in enumerate(zip(cast("list[Any]", live), cast("list[Any]", declared), strict=True)):
            yield from _walk(one, other, f"{path}[{index}]")
    else:
        yield f"{path}: {_short(live)}, declared {_short(declared)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _undeclared(cluster: Cluster, manifests: Sequence[Json]) -> Iterator[Difference]:
    """Objects of the stack's namespace that bear its label, and that it declares no longer."""
    declared = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    places = {(m["apiVersion"], m["kind"]): m for m in manifests if m["metadata"].get("namespace")}
    for (_, kind), manifest in sorted(places.items()):
        collection = cluster.path(manifest).rpartition("/")[0]
        for item in cluster.get(collection, labelSelector=OURS).get("items", []):
            name = item["metadata"]["name"]
            owned = item["metadata"].get("ownerReferences")
            if (kind, name) not in declared and not owned and not name.startswith(INVENTORY):
                yield Difference(what=f"{kind.lower()}/{name}", says="is there, and not declared")


def name_of(manifest: Json) -> str:
    return f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"
