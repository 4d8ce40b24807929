"""The router's configuration: accepted by the real Envoy, and what it says."""

import subprocess
import sysconfig
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.components.envoy import Backend, bootstrap
from infra.spec import Router

ENVOY = Path(sysconfig.get_path("scripts")) / "envoy"
CHAT = Backend(name="chat", host="chat-pods", port=8000, ready="/health/ready", paths=("/",), lingers=True)
CODE = Backend(name="code", host="code-pods", port=8000, ready="/health/ready", paths=("/",), lingers=True)
POLICIES = ("round_robin", "random", "least_request", "ring_hash", "maglev")


def routes(config: dict[str, Any]) -> list[dict[str, Any]]:
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return manager["route_config"]["virtual_hosts"][0]["routes"]


def clusters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}


@pytest.mark.parametrize(("policy", "cookie"), list(product(POLICIES, (None, "session"))))
def test_envoy_accepts_every_policy(tmp_path: Path, policy: Any, cookie: str | None) -> None:
    config = bootstrap(Router(policy=policy, cookie=cookie), [CHAT, CODE])
    file = tmp_path / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [ENVOY, "--mode", "validate", "-c", file, "--disable-hot-restart", "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_envoy_accepts_a_header_hash_and_refuses_nonsense(tmp_path: Path) -> None:
    file = tmp_path / "envoy.yaml"
    every = Router(
        policy="ring_hash", cookie="s", hash_prefix_chars=256, hash_balance_percent=150, outliers=None, retries=0
    )
    for router, code in ((Router(policy="maglev", hash_header="x-user"), 0), (every, 0), (None, 1)):
        config = bootstrap(router, [CHAT]) if router else {"static_resources": {"listenerz": []}}
        file.write_text(yaml.safe_dump(config))
        done = subprocess.run([ENVOY, "--mode", "validate", "-c", file, "--disable-hot-restart"], capture_output=True)
        assert done.returncode == code


def test_one_service_is_at_the_root_and_several_at_their_names() -> None:
    def prefixes(*backends: Backend) -> list[str]:
        return [r["match"]["prefix"] for r in routes(bootstrap(Router(), backends)) if "route" in r]

    assert prefixes(CHAT) == ["/chat/", "/"]
    assert prefixes(CHAT, CODE) == ["/chat/", "/code/"]


def test_metrics_are_never_exposed() -> None:
    for backends in ([CHAT], [CHAT, CODE]):
        found = routes(bootstrap(Router(), backends))
        for index, route in enumerate(found):
            if "route" in route:
                prefix = route["match"]["prefix"]
                before = [r["match"]["prefix"] for r in found[:index] if "direct_response" in r]
                assert f"{prefix}metrics" in before


def test_nothing_is_sent_again_once_an_answer_has_begun() -> None:
    for route in routes(bootstrap(Router(), [CHAT])):
        if "route" in route:
            retries = route["route"]["retry_policy"]
            assert set(retries["retry_on"].split(",")) <= {
                "connect-failure",
                "refused-stream",
                "reset-before-request",
                "retriable-status-codes",
            }
            # What is meant, as 429 and 504, is the client's to hear.
            assert retries["retriable_status_codes"] == [500, 502, 503]


def test_streams_are_not_cut_by_a_route_timeout() -> None:
    for route in routes(bootstrap(Router(stream_timeout_s=77), [CHAT])):
        if "route" in route:
            assert route["route"]["timeout"] == "0s"
            assert route["route"]["max_stream_duration"]["max_stream_duration"] == "77s"


def test_replicas_that_are_not_ready_get_nothing() -> None:
    cluster = clusters(bootstrap(Router(), [CHAT]))["chat"]
    assert cluster["health_checks"][0]["http_health_check"]["path"] == "/health/ready"
    # With traffic or without: the default is once a minute while nobody calls.
    assert cluster["health_checks"][0]["no_traffic_interval"] == "1s"
    assert cluster["common_lb_config"]["healthy_panic_threshold"] == {"value": 0}


def test_a_session_cookie_names_a_replica_under_every_policy() -> None:
    def filters(router: Router) -> list[str]:
        listener = bootstrap(router, [CHAT])["static_resources"]["listeners"][0]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        return [http_filter["name"] for http_filter in manager["http_filters"]]

    for policy in POLICIES:
        assert "envoy.filters.http.stateful_session" in filters(Router(policy=policy, cookie="s"))  # pyright: ignore[reportArgumentType]
        assert "envoy.filters.http.stateful_session" not in filters(Router(policy=policy))  # pyright: ignore[reportArgumentType]


def test_a_hashing_policy_hashes_one_thing_and_else_the_clients_address() -> None:
    address = {"connection_properties": {"source_ip": True}}
    for keys, first in (
        ({"hash_header": "x-user"}, {"header": {"header_name": "x-user"}, "terminal": True}),
        ({"hash_cookie": "sid"}, {"cookie": {"name": "sid"}, "terminal": True}),
        ({"hash_prefix_chars": 64}, {"header": {"header_name": "x-slipway-prefix"}, "terminal": True}),
    ):
        hashes = routes(bootstrap(Router.model_validate({"policy": "maglev"} | keys), [CHAT]))[-1]["route"][
            "hash_policy"
        ]
        assert hashes == [first, address]
    with pytest.raises(ValueError, match="hash_header is hashed already"):
        Router(policy="maglev", hash_header="x", hash_prefix_chars=64)
    with pytest.raises(ValueError, match="needs policy ring_hash or maglev"):
        Router(policy="random", hash_cookie="sid")
    assert [Router(hash_cookie="sid").policy, Router(cookie="sid").policy] == ["maglev", "least_request"]


@pytest.mark.parametrize("key", ["hash_header", "hash_cookie", "cookie"])
@pytest.mark.parametrize("name", ["", "a b", "a;b", "ü", ":path", "a\n"])
def test_a_name_that_no_request_can_carry_is_refused(key: str, name: str) -> None:
    """Envoy takes it, and balances by nothing."""
    with pytest.raises(ValueError, match=key):
        Router.model_validate({key: name})


def test_a_header_that_the_router_refuses_is_no_key_of_a_session() -> None:
    manager = bootstrap(Router(), [CHAT])["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    options = manager["typed_config"]["common_http_protocol_options"]
    assert options["headers_with_underscores_action"] == "REJECT_REQUEST"
    with pytest.raises(ValueError, match="hash_header"):
        Router(hash_header="x_user")
    assert Router(cookie="my_session").cookie == "my_session"


def test_the_admin_interface_is_the_pods_own() -> None:
    config = bootstrap(Router(), [CHAT])
    assert config["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    listener = config["static_resources"]["listeners"][1]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    exposed = {
        r["match"]["path"]: r["route"]["prefix_rewrite"] for r in manager["route_config"]["virtual_hosts"][0]["routes"]
    }
    assert exposed == {"/metrics": "/stats/prometheus", "/ready": "/ready"}
