"""`slipway plan --fix`: patches of error findings, applied until the stack is clean or no patch helps."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.checks import Finding, check
from infra.cli.edit import apply
from infra.cli.project import Refusal, planned
from infra.planner import plan
from infra.spec import load

ROUNDS = 50
"""Patches at most; each ends a finding, and may bring another one to light."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    before: str
    after: str
    applied: tuple[Finding, ...]
    """Error findings that patches ended, in order."""


def fix(file: Path) -> Fixed:
    """Mend the stack file, all at once and whole. Raises StackError for one that cannot be read, Refusal where it cannot be written."""
    planned(file)  # its errors name the file itself
    before = file.read_bytes().decode()
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / file.name

        def errors(text: str) -> list[Finding]:
            trial.write_bytes(text.encode())
            stack = load(trial)
            return [finding for finding in check(stack, plan(stack)) if finding.severity == "error"]

        fixed = _mend(before, errors)
    if fixed.after != before:
        _write(file, fixed.after)
    return fixed


def _mend(before: str, errors: Callable[[str], list[Finding]]) -> Fixed:
    """The text with the fewest errors on the way that the patches lead."""
    text, applied, tried = before, list[Finding](), set[str]()
    found = errors(text)
    best, fewest, helped = text, len(found), 0
    for _ in range(ROUNDS):
        open_ones = [finding for finding in found if finding.patch and str(dict(finding.patch)) not in tried]
        if not open_ones:
            break
        finding = open_ones[0]
        assert finding.patch is not None
        tried.add(str(dict(finding.patch)))
        try:
            changed = apply(text, finding.patch)
            left = errors(changed)
        except ValueError:  # the patch contradicts another value: it does not help
            continue
        if (finding.code, finding.where) in {(other.code, other.where) for other in left}:
            continue
        text, found = changed, left
        applied.append(finding)
        if len(found) < fewest:
            best, fewest, helped = text, len(found), len(applied)
    return Fixed(before=before, after=best, applied=tuple(applied[:helped]))


def _write(file: Path, text: str) -> None:
    """Whole or not at all; a link stays one."""
    file = file.resolve()
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_bytes(text.encode())
        beside.chmod(file.stat().st_mode)
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Refusal(f"{error.strerror} ({file}). Fix: make it writable, or edit it by hand") from None
