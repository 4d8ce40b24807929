"""What a check says: a code, how bad it is, where in the stack file, what is wrong with the numbers, and the change that fixes it."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warn"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    code: str
    """`SLW1xx` capacity, `2xx` memory, `3xx` scheduling, `4xx` autoscaling and metrics, `5xx` roll-out, `6xx` security, `7xx` cost."""
    severity: Severity
    where: str
    """Key of the stack file: `training.nodes`, `services.chat.autoscaling.max_replicas`."""
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code} {self.severity}: {self.where}: {self.message}. Fix: {self.fix}"


class Refused(ValueError):
    """The stack has findings of severity `error`; nothing may be created."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        super().__init__("\n".join(str(finding) for finding in findings if finding.severity == "error"))
        self.findings = findings
