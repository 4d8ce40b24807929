"""How Envoy chooses a replica, stays with it, tries another and leaves one alone: the parts of its configuration that say so."""

from typing import Any

from infra.spec import Router

Json = dict[str, Any]
TYPES = "type.googleapis.com/envoy"
SESSION_FILTER = "envoy.filters.http.stateful_session"
SESSION_TYPES = f"{TYPES}.extensions.filters.http.stateful_session.v3"
LB_POLICY = {
    "round_robin": "ROUND_ROBIN",
    "random": "RANDOM",
    "least_request": "LEAST_REQUEST",
    "ring_hash": "RING_HASH",
    "maglev": "MAGLEV",
}
RING_SIZE = 65_536
"""Points of the ring: with 1,024, the default, shares of three replicas differ by a tenth, and what moves by 2 % of all sessions."""
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
PREFIX_HEADER = "x-slipway-prefix"
SEARCHED_BYTES = 1 << 20
"""How far into a body the prompt is looked for."""
FAILED = (500, 502, 503)
"""Answers that another replica may better: a bug, a broken connection, a drain. 504 and 429 are meant."""


def lb_policy(router: Router) -> Json:
    ring = {"ring_hash_lb_config": {"minimum_ring_size": RING_SIZE}} if router.policy == "ring_hash" else {}
    return {"lb_policy": LB_POLICY[router.policy], **ring}


def balance_limit(router: Router) -> Json:
    """Consistent hashing with bounded loads: a prompt that everybody sends spills over to the next replica."""
    if router.hash_balance_percent is None:
        return {}
    return {"consistent_hashing_lb_config": {"hash_balance_factor": router.hash_balance_percent}}


def hash_policy(router: Router) -> list[Json]:
    """What ring_hash and maglev hash: header, cookie or the prompt's prefix, where a request has it; else the client's address."""
    if not router.hashes:
        return []
    policies: list[Json] = []
    if router.hash_header:
        policies.append({"header": {"header_name": router.hash_header}, "terminal": True})
    if router.hash_cookie:
        policies.append({"cookie": {"name": router.hash_cookie}, "terminal": True})
    if router.hash_prefix_chars:
        policies.append({"header": {"header_name": PREFIX_HEADER}, "terminal": True})
    return [*policies, {"connection_properties": {"source_ip": True}}]


def affinity_filters(router: Router) -> list[Json]:
    """Filters before the routing: one that names the prompt's prefix, one that names the session's replica."""
    filters: list[Json] = []
    if router.hash_prefix_chars:
        typed = {
            "@type": f"{TYPES}.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": _prefix_script(router.hash_prefix_chars)},
        }
        filters.append({"name": "envoy.filters.http.lua", "typed_config": typed})
    if router.cookie:
        typed = {"@type": f"{SESSION_TYPES}.StatefulSession", **_session(router, path="/")}
        filters.append({"name": SESSION_FILTER, "typed_config": typed})
    return filters


def session_below(router: Router, *, prefix: str) -> Json:
    """What a route below a service's own `prefix` has of its own: a cookie for that path, or services would overwrite each other's."""
    if router.cookie is None or prefix == "/":
        return {}
    own = {"@type": f"{SESSION_TYPES}.StatefulSessionPerRoute", "stateful_session": _session(router, path=prefix)}
    return {"typed_per_filter_config": {SESSION_FILTER: own}}


def _session(router: Router, *, path: str) -> Json:
    """A session cookie, which names the replica for as long as that one is healthy.

    Under the policies that hash as well: a cookie that Envoy makes to be hashed is the same for all clients of one
    connection, and a load balancer before the router sends many clients over one.
    """
    cookie = {"name": router.cookie, "path": path, "ttl": f"{router.cookie_ttl_s}s"}
    state = {"@type": f"{TYPES}.extensions.http.stateful_session.cookie.v3.CookieBasedSessionState", "cookie": cookie}
    return {"session_state": {"name": "envoy.http.stateful_session.cookie", "typed_config": state}}


def _prefix_script(chars: int) -> str:
    """Lua that puts a hash (djb2) of the prompt's first `chars` bytes into a header. A client's own header of that name is dropped."""
    return f"""
function envoy_on_request(request)
  request:headers():remove("{PREFIX_HEADER}")
  -- What is read is kept whole, up to the longest that can be: an upload is longer.
  if not string.find(request:headers():get("content-type") or "", "json", 1, true) then return end
  local body = request:body()
  if body == nil then return end
  local text = body:getBytes(0, math.min(body:length(), {SEARCHED_BYTES}))
  local _, colon = string.find(text, '"messages"%s*:')
  if colon == nil then _, colon = string.find(text, '"prompt"%s*:') end
  if colon == nil then return end
  local hash = 5381
  for _, byte in ipairs({{string.byte(text, colon + 1, colon + {chars})}}) do
    hash = (hash * 33 + byte) % 4294967296
  end
  request:headers():add("{PREFIX_HEADER}", string.format("%08x", hash))
end
"""


def retries(router: Router) -> Json | None:
    """Another replica, and only before the first byte of an answer: what has begun to stream is never sent twice.

    A connection that breaks after the request was sent is not tried again: what made one replica die may be the request.
    """
    if not router.retries:
        return None
    return {
        "retry_on": "connect-failure,refused-stream,reset-before-request,retriable-status-codes",
        "retriable_status_codes": list(FAILED),
        "num_retries": router.retries,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": f"{TYPES}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
            }
        ],
        "host_selection_retry_max_attempts": 5,
    }


def outlier_detection(router: Router) -> Json:
    """Ejection by errors in a row; shares of success say little where there are three replicas."""
    outliers = router.outliers
    if outliers is None:
        return {}
    return {
        "outlier_detection": {
            "consecutive_5xx": outliers.consecutive_errors,
            "enforcing_consecutive_5xx": 100,
            "consecutive_gateway_failure": outliers.consecutive_errors,
            "enforcing_consecutive_gateway_failure": 100,
            "enforcing_success_rate": 0,
            "base_ejection_time": f"{outliers.ejected_s}s",
            "max_ejection_percent": outliers.max_percent,
            # Its health is asked each second, and says nothing of its answers: it would be back at once.
            "successful_active_health_check_uneject_host": False,
        },
        "typed_extension_protocol_options": {HTTP_OPTIONS: _counted_errors()},
    }


def _counted_errors() -> Json:
    """What counts against a replica: 504 is a client's own deadline, and a few short ones would take a replica from all others."""
    codes = {"safe_regex": {"regex": "|".join(map(str, FAILED))}}
    status = {"name": ":status", "string_match": codes}
    return {
        "@type": f"{TYPES}.{HTTP_OPTIONS.removeprefix('envoy.')}",
        "explicit_http_config": {"http_protocol_options": {}},
        "outlier_detection": {"error_matcher": {"http_response_headers_match": {"headers": [status]}}},
    }


def circuit_breakers(router: Router) -> Json:
    limits = router.circuit
    return {
        "thresholds": [
            {
                "max_connections": limits.connections,
                "max_pending_requests": limits.pending,
                "max_requests": limits.requests,
                "max_retries": limits.retries,
            }
        ]
    }
