"""Run every benchmark of this folder, one after another, and show their rows: `make bench`, or `python -m tests.bench NAME…`.

A benchmark is a program `bench_NAME.py` that measures ours beside a peer in one run and writes `build/bench/NAME.json`,
a list of rows `{name, ours, peer, ratio, goal, unit}`; `ratio` is ours to the peer's and `goal` what it should reach.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = Path("build/bench")


def main(names: list[str]) -> int:
    console = Console()
    there = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    if unknown := set(names) - set(there):
        console.print(f"error: no benchmark {', '.join(sorted(unknown))}; there is {', '.join(there)}", style="red")
        return 2
    failed = [name for name, path in there.items() if name in (names or there) and not _run(name, path, console)]
    return 1 if failed else 0


def _run(name: str, path: Path, console: Console) -> bool:
    console.print(f"[bold]{name}[/]")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if subprocess.run([sys.executable, str(path)]).returncode:
        console.print(f"{path.name} failed", style="red")
        return False
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "ours", "peer", "ratio", "goal", "unit"):
        table.add_column(column)
    for row in json.loads((RESULTS / f"{name}.json").read_text()):
        table.add_row(
            *(
                "–" if row[key] is None else f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key])
                for key in ("name", "ours", "peer", "ratio", "goal", "unit")
            )
        )
    console.print(table)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
