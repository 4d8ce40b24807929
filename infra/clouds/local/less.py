"""Less of a Go module: what no stack uses is left out of its build, and with it the SDKs that are compiled for that alone.

A copy of the module without these parts takes its place. What the rest of it calls of them is declared by files of ours,
`tools/NAME/instead`, which refuse.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Less:
    module: str
    without: tuple[str, ...]
    """Patterns of the files that are left out."""
    but: tuple[str, ...]
    """Files that stay all the same."""
    choice: str
    """The file that chooses among what is there: of its cases those stay whose constructors do."""


SCALERS = ("cpu_memory", "cron", "kubernetes_workload", "prometheus")
LESS: Mapping[str, Less] = {
    # Of KEDA's 80 scalers and the clouds' stores of secrets: 1,400 s of compiling are 300.
    "keda": Less(
        module="github.com/kedacore/keda/v2",
        without=(
            *("pkg/scalers/*_scaler.go", "pkg/scalers/aws/*", "pkg/scalers/azure/*", "pkg/scalers/gcp/*"),
            *("pkg/scaling/resolver/*_handler.go", "pkg/eventemitter/azure_*.go", "pkg/util/ginkgo_*.go"),
        ),
        but=tuple(f"pkg/scalers/{name}_scaler.go" for name in SCALERS),
        choice="pkg/scaling/scalers_builder.go",
    ),
}
CASE = re.compile(r'\tcase "[^"]+":\n\t\treturn scalers\.(\w+)\(.*\)\n')
CONSTRUCTOR = re.compile(r"^func (New\w+)\(", re.MULTILINE)


def make(less: Less, whole: Path, *, tool: Path, folder: Path) -> None:
    """Write to `folder` what is built instead of `tool`: its go.mod, and in `less/` what stays of the module in `whole`."""
    folder.mkdir()
    for path in whole.rglob("*"):
        inside = path.relative_to(whole)
        if path.is_file() and (str(inside) in less.but or not any(inside.match(one) for one in less.without)):
            _copy(path, folder / "less" / inside)
    for path in (tool / "instead").rglob("*.go"):
        _copy(path, folder / "less" / path.relative_to(tool / "instead"))
    kept = {name for path in less.but for name in CONSTRUCTOR.findall((whole / path).read_text())}
    choice = folder / "less" / less.choice
    choice.write_text(CASE.sub(lambda case: case[0] if case[1] in kept else "", choice.read_text()))
    _copy(tool / "go.sum", folder / "go.sum")
    # A path within the folder, so that programs are the same wherever they are built.
    (folder / "go.mod").write_text((tool / "go.mod").read_text() + f"\nreplace {less.module} => ./less\n")


def _copy(path: Path, to: Path) -> None:
    """Its content alone: files of Go's module cache are read-only."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
