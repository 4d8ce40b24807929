"""One policy a code: errors are mandatory, warnings advisory. Rules see a resource's properties as Kubernetes would."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from pulumi_policy import (
    EnforcementLevel,
    Policy,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    StackValidationArgs,
    StackValidationPolicy,
)

from infra.checks import MANIFEST_CHECKS, SET_CHECKS, Finding, codes_of
from infra.checks.manifests import ERRORS
from infra.checks.objects import Json, name_of

KUBERNETES = "kubernetes:"


def policies() -> list[Policy]:
    """The pack's policies, one for each code of the rules about objects, in the order of the rules."""
    of_one = [_of_one(code, said, rule) for rule in MANIFEST_CHECKS for code, said in codes_of(rule).items()]
    of_many = [_of_many(code, said, rule) for rule in SET_CHECKS for code, said in codes_of(rule).items()]
    return [*of_one, *of_many]


def _of_one(code: str, meaning: str, rule: Callable[[Json], Iterator[Finding]]) -> Policy:
    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        if args.resource_type.startswith(KUBERNETES):
            for finding in _only(code, rule(args.props)):
                report(_say(finding), None)

    return ResourceValidationPolicy(name=code, description=meaning, enforcement_level=_level(code), validate=validate)


def _of_many(code: str, meaning: str, rule: Callable[[Sequence[Json]], Iterator[Finding]]) -> Policy:
    def validate(args: StackValidationArgs, report: ReportViolation) -> None:
        ours = [resource for resource in args.resources if resource.resource_type.startswith(KUBERNETES)]
        urns = {name_of(resource.props): resource.urn for resource in ours}
        for finding in _only(code, rule([resource.props for resource in ours])):
            report(_say(finding), urns[finding.where])

    return StackValidationPolicy(name=code, description=meaning, enforcement_level=_level(code), validate=validate)


def _only(code: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """A rule may tell of two codes; each policy reports its own."""
    return (finding for finding in findings if finding.code == code)


def _say(finding: Finding) -> str:
    return f"{finding.where}: {finding.message}. Fix: {finding.fix}"


def _level(code: str) -> EnforcementLevel:
    return EnforcementLevel.MANDATORY if code in ERRORS else EnforcementLevel.ADVISORY
