"""The trainer's programs as real processes, and the small config that the tests share."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
TRAIN = {
    "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "max_context": 32},
    "seq": 32,
    "global_batch": 4,
    "micro_batch": 2,
    "steps": 12,
    "optim": {"lr": 4e-3, "warmup_steps": 2},
    "checkpoint": {"every_steps": 4, "keep": 3},
    "log_every_steps": 1,
}


def run_program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=program_environment(**environment), timeout=300)


def program_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}
