"""What a check says: a code, how bad it is, where, what is wrong with the numbers, and the change that fixes it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infra.spec import line_finder

Severity = Literal["error", "warn"]
Value = str | int | float | bool | tuple[str, ...] | None
Patch = Mapping[str, Value]
"""Dotted path in the stack file → new value: `{"node_pools.serve.max_nodes": 9}`. Items of a list go by their `name`."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    code: str
    """`SLW1xx` capacity, `2xx` memory, `3xx` scheduling, `4xx` autoscaling and metrics, `5xx` roll-out, `6xx` security, `7xx` cost."""
    severity: Severity
    where: str
    """Key of the stack file (`training.nodes`, `services.chat.autoscaling.max_replicas`), or `Kind/namespace/name` of an object."""
    message: str
    fix: str
    patch: Patch | None = None
    """The fix as values of the stack file, where it follows from what the file says; applied, the finding ends."""

    def __str__(self) -> str:
        return f"{self.code} {self.severity}: {self.where}: {self.message}. Fix: {self.fix}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


class Refused(ValueError):
    """The stack has findings of severity `error`; nothing may be created. With its `file` each is told with its line."""

    def __init__(self, findings: tuple[Finding, ...], *, file: Path | None = None) -> None:
        errors = [finding for finding in findings if finding.severity == "error"]
        line_of = line_finder(file) if file else None
        places = [f"{file}:{line_of(finding.where)}: " if line_of else "" for finding in errors]
        super().__init__("\n".join(f"{place}{error}" for place, error in zip(places, errors, strict=True)))
        self.findings = findings
