"""How bad a finding is: as its rule says, unless the stack or the policy says otherwise."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from infra.checks.finding import Finding
from infra.spec import Severity


def graded(findings: Iterable[Finding], severities: Mapping[str, Severity]) -> tuple[Finding, ...]:
    """Findings with the severities that were asked for, errors first; what is `off` is left out."""
    wanted = [(finding, severities.get(finding.code, finding.severity)) for finding in findings]
    kept = [replace(finding, severity=severity) for finding, severity in wanted if severity != "off"]
    return tuple(sorted(kept, key=lambda finding: (finding.severity, finding.code, finding.where)))
