"""SLW309: paths of this machine, which no pod of a cluster has."""

from collections.abc import Iterator

from infra.checks.finding import Finding, Refused
from infra.planner import Plan
from infra.spec import Stack


def nodes_have_no_directory(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW309: a directory of this machine is on no node of a cloud; `slipway local` alone reads one."""
    if stack.platform.cloud != "local":
        yield from _of_this_machine(stack)


def enforce_directories(stack: Stack, *, here: bool) -> None:
    """Raises Refused for paths of this machine where pods run elsewhere, and `here` for those that do not exist."""
    found = tuple(_absent(stack) if here else _of_this_machine(stack))
    if found:
        raise Refused(found)


def _of_this_machine(stack: Stack) -> Iterator[Finding]:
    for key, located in stack.training.located.items() if stack.training else ():
        if located.here:
            yield Finding(
                code="SLW309",
                severity="error",
                where=f"{key}.path",
                message=f"{located.path} is a path of this machine, and the pods of a cluster do not have it",
                fix="an fsspec URL such as s3://…, or volume_claim: the PersistentVolumeClaim that holds it"
                if key != "training.base"
                else "volume_claim: the PersistentVolumeClaim that holds it",
            )


def _absent(stack: Stack) -> Iterator[Finding]:
    for key, located in stack.training.located.items() if stack.training else ():
        if located.here and not located.here.exists():
            yield Finding(
                code="SLW309",
                severity="error",
                where=f"{key}.path",
                message=f"there is no {located.here}",
                fix="a path that exists; a relative one begins at the checkout",
            )
