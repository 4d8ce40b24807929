"""The router before the services: how it chooses a replica, and what it does when one answers badly."""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, NonNegativeInt, Port, PositiveInt, Spec


class OutlierEjection(Spec):
    """When a replica that answers badly is left alone for a while."""

    consecutive_errors: PositiveInt = 5
    """5xx answers and broken connections in a row."""
    ejected_s: PositiveInt = 10
    """First time away, seconds; it grows with each further one."""
    max_percent: Annotated[int, Field(ge=1, le=100)] = 50
    """Replicas that may be away at once, percent."""


class Circuit(Spec):
    """What one router pod sends to a service at most; above it the answer is 503 at once, with `Retry-After`."""

    connections: PositiveInt = 65_536
    """Connections to its replicas."""
    requests: PositiveInt = 65_536
    """Requests in flight. The server's own limit is in tokens, and answers 429."""
    pending: PositiveInt = 65_536
    """Requests that wait for a connection."""
    retries: PositiveInt = 64
    """Retries in flight: in an outage they must not become the load."""


HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]*$")]
"""Without underscores, with which the router refuses a request: what stands behind may take them for dashes."""
CookieName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]
"""RFC 6265, a token."""
HASHED = ("hash_header", "hash_cookie", "hash_prefix_chars")
"""Keys of a router that say what is hashed."""


class Router(Spec):
    policy: Literal["round_robin", "random", "least_request", "ring_hash", "maglev"] = "least_request"
    """How a replica is chosen. Where a `hash_` key is given the default is maglev, which moves fewer sessions than ring_hash."""
    hash_header: HeaderName | None = None
    """Request header that ring_hash and maglev hash; without any of these keys: the client's address."""
    hash_cookie: CookieName | None = None
    """Cookie of the clients' own that ring_hash and maglev hash."""
    hash_prefix_chars: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Characters of the prompt's beginning that ring_hash and maglev hash: what begins alike finds the same prefix cache."""
    hash_balance_percent: Annotated[int, Field(ge=100, le=10_000)] | None = None
    """Most that ring_hash and maglev give a replica, percent of the mean; what is above goes to the next one. null: no limit."""
    cookie: CookieName | None = None
    """Name of a session cookie: requests that carry it go to the replica that first answered."""
    cookie_ttl_s: PositiveInt = 3600
    """Life of that cookie, seconds."""
    port: Port = 8080
    """Port at which the endpoint is published."""
    expose: Literal["ClusterIP", "LoadBalancer"] = "LoadBalancer"
    """Type of the router's Service."""
    replicas: PositiveInt = 2
    """Envoy pods."""
    stream_timeout_s: PositiveInt = 3600
    """Longest stream, seconds."""
    idle_timeout_s: PositiveInt | None = None
    """Longest silence in an answer, seconds; null: as long as a stream, since what is not streamed is silent until its end."""
    retries: NonNegativeInt = 3
    """Other replicas that are tried before the first byte of an answer; what has begun is never sent twice."""
    outliers: OutlierEjection | None = OutlierEjection()
    """Replicas that answer badly are left alone; null: never."""
    circuit: Circuit = Circuit()
    """Limits towards each service."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_hashed_is_so_by_maglev(cls, values: Any) -> Any:
        given = cast("dict[Any, Any]", values) if isinstance(values, dict) else {}
        if "policy" not in given and any(given.get(key) is not None for key in HASHED):
            return given | {"policy": "maglev"}
        return cast(Any, values)

    @model_validator(mode="after")
    def _hash_needs_a_hash_policy(self) -> Self:
        hashed = [key for key in HASHED if getattr(self, key) is not None]
        balanced = ["hash_balance_percent"] if self.hash_balance_percent is not None else []
        for key in () if self.hashes else (*hashed, *balanced):
            raise Misplaced(f"needs policy ring_hash or maglev, and policy is {self.policy}", key)
        if len(hashed) > 1:
            raise Misplaced(f"{hashed[0]} is hashed already; leave one of the two out", hashed[1])
        return self

    @property
    def hashes(self) -> bool:
        """The policy sends what hashes alike to the same replica."""
        return self.policy in ("ring_hash", "maglev")
