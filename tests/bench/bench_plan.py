"""How long the commands that people wait for take, as whole processes, against the time that they may take (no peer does this)."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
COMMANDS = {
    "slipway render -s prod": (["render", "-s", "prod", "-o"], 3.0),
    "slipway plan -s prod": (["plan", "-s", "prod"], 2.0),
}


def seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "infra.cli.main", *arguments], check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (arguments, goal) in COMMANDS.items():
            whole = [*arguments, folder] if arguments[-1] == "-o" else arguments
            seconds(whole)  # warm the page cache
            median = statistics.median(seconds(whole) for _ in range(RUNS))
            rows.append({"name": name, "ours": median, "peer": None, "ratio": None, "goal": f"≤ {goal:g}", "unit": "s"})
    out = Path("build/bench/plan.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
