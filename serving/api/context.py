"""What the routes share: the model's host, who may ask, and the state of the process; and who asks, per request."""

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request

from serving.auth import PRIORITIES, Key, Keys
from serving.clerk import Clerk
from serving.host import ModelHost
from serving.limits import Quota, Quotas
from serving.pressure import MemoryWatch
from serving.pulse import Pulse
from serving.sessions import Sessions
from serving.settings import Settings
from serving.tracing import Spans, Trace


class Lifecycle:
    """Whether new requests are wanted, and taken; and how many of those taken are not answered to their end."""

    def __init__(self) -> None:
        self.leaving = False  # says that it is not ready, and answers whoever has not heard of it
        self.draining = False  # refuses what comes
        self.at_once = asyncio.Event()  # nobody is to be waited for before refusing
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def enter(self) -> None:
        self.active += 1
        self.idle.clear()

    def leave(self) -> None:
        self.active -= 1
        if not self.active:
            self.idle.set()


@dataclass(frozen=True)
class Context:
    host: ModelHost
    settings: Settings
    lifecycle: Lifecycle
    sessions: Sessions
    memory: MemoryWatch
    keys: Keys | None = None  # None: everyone may ask
    spans: Spans | None = None
    quotas: Quotas = field(default_factory=Quotas)
    clerk: Clerk = field(default_factory=Clerk)
    pulse: Pulse = field(default_factory=Pulse)

    def unready(self) -> dict[str, str] | None:
        """Why a request would not be answered now; None when it would."""
        if self.lifecycle.leaving:
            return {"status": "draining"}
        if self.host.current is None:
            return {"status": "not ready", "why": self.host.why_not_ready}
        if self.memory.look():
            return {"status": "overloaded", "why": "memory is short; new requests are refused"}
        if self.pulse.is_lost(self.host.current.engine):
            return {"status": "stuck", "why": "the engine has work, and does not move"}
        return None


@dataclass(frozen=True)
class Caller:
    """Who asks, and as part of what."""

    request_id: str
    trace: Trace | None = None
    name: str = ""  # of the key; empty when there are no keys
    tenant: str = ""
    priority: int = 0  # the engine's: a higher one is admitted first
    quota: Quota | None = None
    deadline_s: float | None = None  # from the request's arrival on

    @classmethod
    def of(cls, request: Request) -> "Caller":
        return request.scope["caller"]


def caller_with(
    key: Key, context: Context, *, request_id: str, trace: Trace | None = None, deadline_s: float | None = None
) -> Caller:
    """The caller that presented `key`."""
    return Caller(
        request_id=request_id,
        trace=trace,
        name=key.name,
        tenant=key.queue_as,
        priority=PRIORITIES[key.priority],
        quota=context.quotas.of(key),
        deadline_s=deadline_s,
    )
