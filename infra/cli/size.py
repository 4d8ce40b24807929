"""`slipway size`: the cheapest hardware for a model, without a stack: to train it by a deadline, or to serve it within a latency."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from infra.catalog import model as known_model
from infra.cli.project import AsJson, Refusal, people, print_json
from infra.cli.show import count, duration
from infra.planner.search import Choice, Found, cheapest_serving, cheapest_training, of_cloud
from infra.planner.serve_memory import format_of
from infra.planner.shape import Shape
from infra.spec import Slo, Traffic

MOST = 1e18
"""Above it a number is a slip of the keyboard."""


def size(
    model: Annotated[str, typer.Argument(help="A model of the catalogue (`llama3-8b`), or the path of a config.json.")],
    tokens: Annotated[float | None, typer.Option(help="Train on so many tokens (`2e12`).")] = None,
    deadline: Annotated[float | None, typer.Option(help="… within so many hours.")] = None,
    seq: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 4096,
    global_batch: Annotated[int, typer.Option(help="Sequences in an optimizer step.")] = 512,
    rps: Annotated[float | None, typer.Option(help="Serve so many requests a second.")] = None,
    ttft: Annotated[float | None, typer.Option(help="… with the first token within so many seconds (p95).")] = None,
    tpot: Annotated[float | None, typer.Option(help="… and so many seconds for each token after it (p95).")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Mean length of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Mean length of an answer.")] = 128,
    weights: Annotated[str, typer.Option(help="Format of the served weights: bf16, fp8, int8, int4, fp32.")] = "bf16",
    cloud: Annotated[str | None, typer.Option(help="Only instances of this cloud.")] = None,
    json: AsJson = False,
) -> None:
    """Find the cheapest instances that train or serve a model, and the next best three.

    Every instance of the catalogue, number of nodes and layout is held against memory with a margin and the deadline, or
    against the latency of simulated traffic. Exits 2 when none does it.
    """
    shape = shape_called(model)
    among = of_cloud(cloud)
    if not among:
        raise Refusal(f"no instance of that cloud has a GPU and a price ({cloud}). Fix: leave --cloud out")
    if (tokens is None) == (rps is None):
        raise Refusal(
            "nothing to size for. Fix: --tokens N --deadline HOURS to train, or --rps R --ttft SECONDS to serve"
        )
    if tokens is not None:
        _positive(tokens=tokens, deadline=deadline, seq=seq, global_batch=global_batch)
        found = cheapest_training(
            shape,
            tokens=tokens,
            deadline_h=cast(float, deadline),
            seq=seq,
            global_batch=global_batch,
            among=among,
        )
    else:
        _positive(rps=rps, ttft=ttft, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        if tpot is not None:
            _positive(tpot=tpot)
        found = cheapest_serving(
            shape,
            traffic=Traffic(rps=cast(float, rps), prompt_tokens=prompt_tokens, output_tokens=output_tokens),
            slo=Slo(ttft_p95_s=cast(float, ttft), tpot_p95_s=tpot),
            among=among,
            form=format_of(weights),
        )
    if json:
        print_json({"model": model, "parameters": shape.parameters} | asdict(found))
    else:
        show(found, model=model, shape=shape, trains=tokens is not None)
    if not found.choices:
        raise typer.Exit(2)


def shape_called(name: str) -> Shape:
    """The shape of a catalogue's model or of a Hugging Face config.json. Raises ValueError with the nearest names, `Refusal`."""
    path = Path(name)
    if not (path.suffix == ".json" or path.is_dir() or "/" in name):
        return Shape.from_config(known_model(name))
    file = path / "config.json" if path.is_dir() else path
    try:
        config: Any = jsonlib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"no such file ({file}). Fix: name a model of the catalogue, or a config.json") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Refusal(f"not JSON in UTF-8: {error} ({file}). Fix: give a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise Refusal(f"no JSON object ({file}). Fix: give a Hugging Face config.json")
    try:
        return Shape.from_config(cast("dict[str, Any]", config))
    except ValueError as error:
        raise Refusal(f"{error} ({file}). Fix: give the config.json of a decoder") from None


def _positive(**values: float | None) -> None:
    """Raise `Refusal` for what is missing, not above zero, or not a number that can be meant."""
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is None:
            raise Refusal(f"{option} is missing. Fix: give it")
        if not 0 < value < MOST:
            raise Refusal(f"{option} {value:g} is not between 0 and {MOST:g}. Fix: give a positive number")


def show(found: Found, *, model: str, shape: Shape, trains: bool) -> None:
    """The choices as a table, the best first, and why it is that."""
    people.print(f"[bold]{model}[/]  {count(shape.parameters)} parameters")
    if not found.choices:
        people.print(found.why, style="yellow")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    heads = ("instance", "nodes", "layout", "GiB a GPU")
    tells = ("time", "USD", "USD spot", "MFU") if trains else ("USD/h", "TTFT p95", "TPOT p95", "USD/Mtok")
    for name in (*heads, *tells):
        table.add_column(name, justify="left" if name in ("instance", "layout") else "right")
    for rank, choice in enumerate(found.choices):
        cells = _trains(choice) if trains else _serves(choice)
        memory = f"{choice.memory_gib:.0f} of {choice.memory_limit_gib:.0f}"
        place = f"{choice.instance} ({choice.gpu})"
        table.add_row(place, str(choice.nodes), choice.layout, memory, *cells, style="bold green" if rank == 0 else "")
    people.print(table)
    people.print(f"{found.why}; {found.looked_at} candidates looked at, prices on demand", style="dim")


def _trains(choice: Choice) -> tuple[str, ...]:
    numbers = choice.numbers
    spot = f"{numbers['usd_spot']:,.0f}"
    return duration(numbers["hours"] * 3600), f"{numbers['usd']:,.0f}", spot, f"{numbers['mfu']:.0%}"


def _serves(choice: Choice) -> tuple[str, ...]:
    numbers = choice.numbers
    latency = (f"{numbers['ttft_p95_s'] * 1000:.0f} ms", f"{numbers['tpot_p95_s'] * 1000:.0f} ms")
    return f"{choice.usd_per_h:,.2f}", *latency, f"{numbers['usd_per_mtok']:.2f}"
