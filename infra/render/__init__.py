"""`slipway render`: the program's Kubernetes objects as files, without a CLI, a cluster or a credential."""

from infra.render.program import Rendered, run
from infra.render.write import write

__all__ = ["Rendered", "render", "run", "write"]

from pathlib import Path


def render(stack_file: Path, out: Path | None, *, here: bool = False) -> Rendered:
    """Run the program for `stack_file`; write its manifests and `plan.json` to `out` unless that is None. `here`: they will run
    as processes of this machine, whose directories they may then name.

    Raises `StackError` for a bad stack file, `Refused` when a check refuses the stack, `RenderError` for what cannot be
    written. Nothing is written then.
    """
    rendered = run(stack_file, here=here)
    if out is not None:
        write(rendered, out)
    return rendered
