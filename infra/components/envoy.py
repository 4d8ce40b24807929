"""Envoy's bootstrap as a plain dict: a pure function of the router's spec and the services behind it.

Every service is reached under the path prefix `/NAME/`, which is taken off (an OpenAI client's `base_url` is then
`http://ENDPOINT/NAME/v1`); a stack's only service under `/` too. How a replica is chosen, and left alone, is `balancing`'s.
Reference: https://www.envoyproxy.io/docs/envoy/latest/api-v3/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infra.components.balancing import (
    affinity_filters,
    balance_limit,
    circuit_breakers,
    hash_policy,
    lb_policy,
    outlier_detection,
    session_below,
)
from infra.components.balancing import retries as retry_policy
from infra.spec import Router

Json = dict[str, Any]
TYPES = "type.googleapis.com/envoy"
HTTP_PORT, METRICS_PORT, ADMIN_PORT = 10000, 9090, 9901
CONNECTION_AGE_S = 30
"""Age at which a client's connection is asked to close after its present request, so that none outlives a drain unasked."""
BUFFER_BYTES = 8 << 20
"""Longest request body that can be sent again to another replica."""
MANY = 1 << 16
"""Connections of clients that one router pod takes."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One inference service: where its ready pods are resolved."""

    name: str
    host: str
    port: int
    ready: str
    """Path that answers 200 when a request would be answered now."""
    paths: tuple[str, ...]
    """Beginnings of the paths that are passed on."""
    lingers: bool
    """A replica says by `ready` when it wants no more, and answers on; else it is asked as long as it has a name."""


def bootstrap(router: Router, backends: Sequence[Backend]) -> Json:
    """The whole configuration: the public listener, a listener for metrics and readiness, one cluster a service."""
    return {
        "admin": {"address": _address("127.0.0.1", ADMIN_PORT)},
        "static_resources": {
            "listeners": [_public(router, backends), _metrics()],
            "clusters": [*(_cluster(router, backend) for backend in backends), _admin_cluster()],
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{TYPES}.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": MANY,
                    },
                }
            ]
        },
    }


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(name: str, *, port: int, manager: Json) -> Json:
    typed = {"@type": f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", **manager}
    network_filter = {"name": "envoy.filters.network.http_connection_manager", "typed_config": typed}
    return {
        "name": name,
        "address": _address("0.0.0.0", port),  # noqa: S104 — a pod's own network
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [{"filters": [network_filter]}],
    }


def _public(router: Router, backends: Sequence[Backend]) -> Json:
    routes = [route for backend in backends for route in _routes(router, backend, prefix=f"/{backend.name}/")]
    if len(backends) == 1:
        routes += _routes(router, backends[0], prefix="/")
    hosts = [{"name": "services", "domains": ["*"], "routes": routes}]
    return _listener(
        "public",
        port=HTTP_PORT,
        manager={
            "stat_prefix": "public",
            "use_remote_address": True,
            "normalize_path": True,
            "merge_slashes": True,
            # `%2Fmetrics` must not be a way round a route.
            "path_with_escaped_slashes_action": "REJECT_REQUEST",
            "common_http_protocol_options": {
                "idle_timeout": f"{CONNECTION_AGE_S}s",
                "max_connection_duration": f"{CONNECTION_AGE_S}s",
                "headers_with_underscores_action": "REJECT_REQUEST",
            },
            # HTTP/1.1 clients hear `Connection: close` with an answer; streams under way are never cut by age.
            "http1_safe_max_connection_duration": True,
            "request_headers_timeout": "10s",
            "local_reply_config": _errors(),
            "route_config": {"name": "public", "virtual_hosts": hosts},
            "http_filters": [*affinity_filters(router), _router_filter()],
        },
    )


def _errors() -> Json:
    """Answers of the router's own in the shape that OpenAI's clients read, with a hint when to come back."""
    missing = {"filter": {"status_code_filter": _status(503)}, "headers_to_add": [_header("retry-after", "2")]}
    error = {
        "message": "%LOCAL_REPLY_BODY%",
        "type": "router_error",
        "param": None,
        "code": "%RESPONSE_CODE_DETAILS%",
    }
    return {
        "mappers": [missing],
        "body_format": {"json_format": {"error": error}, "content_type": "application/json"},
    }


def _status(code: int) -> Json:
    return {"comparison": {"op": "EQ", "value": {"default_value": code, "runtime_key": f"slipway_status_{code}"}}}


def _header(key: str, value: str) -> Json:
    return {"header": {"key": key, "value": value}}


def _routes(router: Router, backend: Backend, *, prefix: str) -> list[Json]:
    """What stays inside first; then what the runtime passes on, below `prefix`."""
    inside = {
        "match": {"prefix": f"{prefix}metrics"},
        "direct_response": {"status": 404, "body": {"inline_string": "no such path"}},
    }
    return [inside, *(_route(router, backend, prefix=prefix, path=path) for path in backend.paths)]


def _route(router: Router, backend: Backend, *, prefix: str, path: str) -> Json:
    action: Json = {
        "cluster": backend.name,
        # A completion may take as long as its stream; one that is not streamed is silent until its end.
        "timeout": "0s",
        "idle_timeout": f"{router.idle_timeout_s or router.stream_timeout_s}s",
        "max_stream_duration": {"max_stream_duration": f"{router.stream_timeout_s}s"},
    }
    if policy := retry_policy(router):
        action["retry_policy"] = policy
    if prefix != "/":
        action["prefix_rewrite"] = path
    if hashes := hash_policy(router):
        action["hash_policy"] = hashes
    match = {"prefix": prefix + path.removeprefix("/")}
    return {"match": match, "route": action, **session_below(router, prefix=prefix)}


def _router_filter() -> Json:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{TYPES}.extensions.filters.http.router.v3.Router"},
    }


def _cluster(router: Router, backend: Backend) -> Json:
    endpoint = {"endpoint": {"address": _address(backend.host, backend.port)}}
    return {
        "name": backend.name,
        "type": "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        "dns_refresh_rate": "2s",
        "respect_dns_ttl": False,
        "connect_timeout": "1s",
        **lb_policy(router),
        "load_assignment": {"cluster_name": backend.name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        # Never to a replica that is not ready, even when none is: an honest 503 and not a hanging request.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}, **balance_limit(router)},
        # Whose name is gone may be the only one that answers yet: it is asked as long as it says that it is ready.
        "ignore_health_on_host_removal": not backend.lingers,
        "health_checks": [_health_check(backend.ready)],
        **outlier_detection(router),
        "circuit_breakers": circuit_breakers(router),
    }


def _health_check(path: str) -> Json:
    """Each replica's readiness each second, with traffic or without: the default would ask once a minute while nobody calls."""
    return {
        "timeout": "1s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "no_traffic_healthy_interval": "1s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "http_health_check": {"path": path},
    }


def _metrics() -> Json:
    """Statistics and readiness of Envoy, and nothing else of its admin interface."""
    exposed = {"/metrics": "/stats/prometheus", "/ready": "/ready"}
    routes = [
        {"match": {"path": path}, "route": {"cluster": "admin", "prefix_rewrite": rewritten}}
        for path, rewritten in exposed.items()
    ]
    hosts = [{"name": "admin", "domains": ["*"], "routes": routes}]
    return _listener(
        "metrics",
        port=METRICS_PORT,
        manager={
            "stat_prefix": "metrics",
            "route_config": {"name": "metrics", "virtual_hosts": hosts},
            "http_filters": [_router_filter()],
        },
    )


def _admin_cluster() -> Json:
    endpoint = {"endpoint": {"address": _address("127.0.0.1", ADMIN_PORT)}}
    assignment = {"cluster_name": "admin", "endpoints": [{"lb_endpoints": [endpoint]}]}
    return {"name": "admin", "type": "STATIC", "connect_timeout": "1s", "load_assignment": assignment}
