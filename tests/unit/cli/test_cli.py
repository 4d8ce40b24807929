"""The command line's promises: help that teaches, one JSON document on stdout, people's text on stderr, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from infra.cli.board import Board
from infra.cli.project import people
from infra.cli.summary import outcome_of, show_curve, show_evaluation

ROOT = Path(__file__).parents[3]


def slipway(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "infra.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def project(folder: Path, stack_file: Path) -> Path:
    """A project whose only stack is a copy of `stack_file`."""
    (folder / "stacks").mkdir()
    (folder / "Pulumi.yaml").write_text((ROOT / "Pulumi.yaml").read_text())
    (folder / "stacks" / stack_file.name).write_text(stack_file.read_text())
    return folder


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("plan",),
        ("render",),
        ("schema",),
        ("status",),
        ("logs",),
        ("chat",),
        ("local", "up"),
        ("local", "down"),
        ("local", "status"),
        ("local", "logs"),
    ],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    shown = slipway(*command, "--help")
    assert shown.returncode == 0
    assert "Usage:" in shown.stdout
    assert len(shown.stdout.splitlines()) > 8


def test_plan_prints_one_json_document_and_nothing_else() -> None:
    done = slipway("plan", "-s", "prod", "--json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["plan"]["training"]["ranks"] == 16
    assert document["findings"] == []


def test_plan_for_people_goes_to_stderr() -> None:
    done = slipway("plan", "-s", "prod")
    assert done.stdout == ""
    assert "p5.48xlarge" in done.stderr
    assert "GiB a rank" in done.stderr


def test_refused_plan_exits_2_with_the_finding(changed, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = project(tmp_path_factory.mktemp("p"), changed("prod", {"training.nodes": 4}))
    done = slipway("plan", "-s", "prod", cwd=folder)
    assert done.returncode == 2
    assert "SLW101" in done.stderr
    assert "a gang of 4 nodes" in done.stderr


def test_bad_stack_file_exits_2_without_traceback(changed, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = project(tmp_path_factory.mktemp("p"), changed("prod", {"training.stepz": 4}))
    done = slipway("plan", "-s", "prod", cwd=folder)
    assert done.returncode == 2
    assert "did you mean `steps`?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_number_is_no_emoji() -> None:
    with people.capture() as said:
        people.print("stacks/Pulumi.prod.yaml:100: slipway:services.0.name: …")
    assert said.get().startswith("stacks/Pulumi.prod.yaml:100: slipway")


def test_unknown_stack_names_those_that_are_there() -> None:
    done = slipway("plan", "-s", "production")
    assert done.returncode == 2
    assert "dev, local, prod, staging" in done.stderr


def test_unknown_instance_exits_2_with_the_nearest(changed, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = project(tmp_path_factory.mktemp("p"), changed("prod", {"node_pools.0.instance": "p5.48xlrage"}))
    done = slipway("plan", "-s", "prod", cwd=folder)
    assert done.returncode == 2
    assert "p5.48xlarge" in done.stderr


EVENTS = [
    {"event": "progress", "stage": "train", "done": n, "total": 100, "unit": "steps", "step": n, "loss": 5 - n / 50}
    for n in range(1, 101)
] + [
    {"event": "evaluation", "bits_per_byte": 1.9, "baselines": {"unigram": 4.1, "trigram": 2.5, "kneser_ney_5": 2.1}},
    {"event": "artifact", "kind": "plot", "path": "/runs/x/loss.png"},
    {"event": "published", "name": "m", "digest": "ab" * 32, "channel": "production"},
]


def test_outcome_is_read_from_log_lines_and_rubbish_is_passed_over() -> None:
    lines = ["", "plain text", "[1, 2]", "{broken", *(json.dumps(event) for event in EVENTS), '{"event": "unheard of"}']
    outcome = outcome_of(lines)
    assert outcome.curve[100] == 3.0
    assert outcome.artifacts == {"plot": "/runs/x/loss.png"}
    assert outcome.published["channel"] == "production"


def test_outcome_shows_curve_and_every_baseline() -> None:
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    outcome = outcome_of(json.dumps(event) for event in EVENTS)
    show_curve(outcome, console=console)
    show_evaluation(outcome, console=console)
    text = console.export_text()
    assert "training loss" in text
    assert [name in text for name in ("unigram", "trigram, interpolated", "5-gram, Kneser–Ney", "the model")] == [
        True
    ] * 4


def test_a_classifier_is_shown_by_what_it_gets_right() -> None:
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    right = {"value": 0.91, "low": 0.88, "high": 0.94, "count": 400}
    event = {"event": "evaluation", "bits_per_byte": None, "baselines": {}, "accuracy": {"classification": right}}
    show_evaluation(outcome_of([json.dumps(event)]), console=console)
    text = console.export_text()
    assert "texts to classify" in text
    assert "91.0%" in text
    assert "88.0% to 94.0%" in text
    assert "bits per byte" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_board_draws_every_event(terminal: bool) -> None:
    console = Console(record=True, width=120, force_terminal=terminal, file=open(os.devnull, "w"))  # noqa: SIM115
    with Board(console) as board:
        for event in [*EVENTS, {"event": "resumed", "stage": "train", "step": 40}, {"event": "done", "stage": "train"}]:
            board.see(event)
    text = console.export_text()
    assert "goes on from step 40" in text
    assert "published m abababababab" in text
    assert "train" in text
