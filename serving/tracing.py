"""Trace context: W3C `traceparent` in, to the logs, and to OpenTelemetry where its library and a collector are there.

https://www.w3.org/TR/trace-context/ ; spans in the names of OpenTelemetry's conventions for generative AI.
"""

import os
import re
import time
from dataclasses import dataclass
from typing import Any

from serving.errors import Refused

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@dataclass(frozen=True)
class Trace:
    """Whose request this is part of: the caller's trace and span."""

    trace_id: str
    parent_id: str
    sampled: bool


def parse(traceparent: str) -> Trace | None:
    """The trace context of a header; None when there is none, or it is malformed (the standard says: ignore it)."""
    match = TRACEPARENT.fullmatch(traceparent.strip())
    if match is None or (match[4] and traceparent.startswith("00")):
        return None
    return Trace(match[1], match[2], sampled=bool(int(match[3], 16) & 1))


class Spans:
    """One span a request, sent in the background by OpenTelemetry's own exporter, which reads `OTEL_*` by itself."""

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            fix = "Install opentelemetry-exporter-otlp-proto-http and opentelemetry-sdk, or unset the variable"
            where = next(name for name in ENDPOINTS if os.environ.get(name))
            raise Refused("OpenTelemetry is asked for and not installed", where=where, fix=fix) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "slipway-serving")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("slipway.serving")

    @classmethod
    def from_environment(cls) -> "Spans | None":
        """None unless a collector is named. Raises `Refused` when one is and the library is missing."""
        return cls() if any(os.environ.get(name) for name in ENDPOINTS) else None

    def record(
        self, name: str, *, trace: Trace | None, seconds: float, attributes: dict[str, Any], failed: bool
    ) -> None:
        """A span that ends now and began `seconds` ago, under the caller's span when there is one."""
        from opentelemetry import trace as api

        context = None
        if trace is not None:
            parent = api.SpanContext(
                int(trace.trace_id, 16), int(trace.parent_id, 16), is_remote=True,
                trace_flags=api.TraceFlags(int(trace.sampled)),
            )  # fmt: skip
            context = api.set_span_in_context(api.NonRecordingSpan(parent))
        now_ns = time.time_ns()
        span = self._tracer.start_span(
            name, context=context, kind=api.SpanKind.SERVER, start_time=now_ns - int(seconds * 1e9),
            attributes={key: value for key, value in attributes.items() if value is not None},
        )  # fmt: skip
        if failed:
            span.set_status(api.StatusCode.ERROR)
        span.end(end_time=now_ns)

    def close(self) -> None:
        """Sends what is left; waits a few seconds at most."""
        self._provider.shutdown()
