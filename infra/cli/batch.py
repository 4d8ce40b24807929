"""`slipway batch`: answer a file of requests with a model that the stack serves, without its servers."""

import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.markup import escape

from infra.checks import enforce
from infra.cli.board import Board
from infra.cli.local import INTERRUPTED, state_dir
from infra.cli.project import AsJson, Refusal, StackName, people, planned, print_json, stack_file
from infra.cli.secret import secrets_of
from infra.local import Secrets, client
from infra.spec import Batch, Service, Stack, unknown
from infra.spec.base import Misplaced
from infra.spec.document import Dumper, read_document
from infra.spec.wording import say

ARGUMENTS = {"input": "INPUT", "output": "OUTPUT"}
TMP = "/tmp"  # noqa: S108 — as the pods have it
FROM_SERVICE = (
    "model", "channel", "pool", "gpus", "resources", "max_model_len", "max_num_seqs", "kv_gib", "dtype", "quantize",
    "speculate_tokens",
)  # fmt: skip
"""Keys that a batch takes over from the service whose model it asks."""


def batch(
    requests: Annotated[
        str, typer.Argument(metavar="INPUT", help="JSONL in OpenAI's batch form: a file, directory, pattern or URL.")
    ],
    answers: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Directory or URL for answers.jsonl and summary.json.")
    ],
    stack: StackName = "local",
    service: Annotated[
        str | None,
        typer.Option("--service", help="Whose model answers, and on whose pool; the stack's first when left out."),
    ] = None,
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="The route that the lines name.")
    ] = "/v1/chat/completions",
    shards: Annotated[int, typer.Option("--shards", min=1, help="Pods that share the input.")] = 1,
    name: Annotated[str, typer.Option("--name", help="Name of the batch.")] = "batch",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the stack's manifests with the batch there, and run nothing."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Answer a file of requests: one answer for each line, in its order, whatever is killed meanwhile.

    On this machine it runs at once, beside what is up; Ctrl-C stops both. With --out it becomes part of the stack's manifests,
    for a cluster; a stack file says the same under `slipway:batches`.
    """
    file = stack_file(stack)
    # As planned: a batch says plain values, and a service may leave some to the planner.
    spec = planned(file).stack
    output = _absolute(answers, spec)
    asked: dict[str, Any] = {"name": name, "input": _absolute(requests, spec), "output": output, "endpoint": endpoint}
    asked |= {"shards": shards} | _of_service(spec, service)
    _refuse_wrong(asked, spec)
    with tempfile.TemporaryDirectory() as folder:
        with_batch = Path(folder) / file.name
        with_batch.write_text(_added(file, asked), encoding="utf-8")
        with_it = planned(with_batch)
        enforce(with_it.stack, with_it)
        if out is None and spec.platform.cloud != "local":
            raise Refusal(
                f"stack {stack!r} is on {spec.platform.cloud}. Fix: --out DIR, and apply what is written there"
            )
        from infra.render import render  # Pulumi's import takes a second, which a refusal need not wait for

        manifests = out or state_dir(stack) / "manifests"
        rendered = render(with_batch, manifests, here=out is None)
    job = rendered.outputs["batches"][-1]
    if out is None:
        _run(manifests, state_dir(stack), secrets_of(stack))
    said = {"stack": stack, "job": job, "answers": f"{output.rstrip('/')}/answers.jsonl"}
    if json:
        print_json(said | {"manifests": None if out is None else str(out)})
    elif out is None:
        people.print(f"answers: {said['answers']}", markup=False)
    else:
        people.print(
            f"{len(rendered.manifests)} manifests in {out}; once they are applied, job/{job} answers", markup=False
        )


def _of_service(spec: Stack, name: str | None) -> dict[str, Any]:
    """What the batch has in common with a service. Raises `Refusal`."""
    services: dict[str, Service] = {service.name: service for service in spec.services}
    if not services:
        raise Refusal("the stack has no service. Fix: say the batch in the stack file, under slipway:batches")
    if name is not None and name not in services:
        raise Refusal(f"{unknown('service', name, services)}. Fix: --service NAME")
    chosen = services[name or next(iter(services))]
    values = chosen.model_dump(mode="json")
    return {key: values[key] for key in FROM_SERVICE}


def _added(file: Path, asked: dict[str, Any]) -> str:
    """The stack file's text with one batch more."""
    document = read_document(file.read_text(encoding="utf-8-sig")).values
    document["config"].setdefault("slipway:batches", []).append(asked)
    return yaml.dump(document, Dumper=Dumper, sort_keys=False)


def _refuse_wrong(asked: dict[str, Any], spec: Stack) -> None:
    """Raise `Refusal` for what a stack file could not say either, in the words of the command line."""
    if asked["name"] in {batch.name for batch in spec.batches}:
        raise Refusal(f"--name: the stack file has a batch {asked['name']!r} of its own. Fix: another name")
    try:
        Batch.model_validate(asked)
    except ValidationError as error:
        wrong: Any = error.errors()[0]
        cause = wrong.get("ctx", {}).get("error")
        key = str((*wrong["loc"], *(cause.keys if isinstance(cause, Misplaced) else ()))[0])
        raise Refusal(f"{ARGUMENTS.get(key, f'--{key}')}: {say(wrong, known=())}") from None


def _absolute(url: str, spec: Stack) -> str:
    """A path as a pod on this machine sees it. Raises `Refusal` for one that it sees otherwise, or not at all."""
    if not url or ("://" in url and not url.startswith("file://")):
        return url
    if spec.platform.cloud != "local":
        raise Refusal(f"no pod of a cluster sees {url}. Fix: a URL (s3://…), or slipway:batches with a volume_claim")
    path = Path(url.removeprefix("file://")).absolute()
    if path.is_relative_to(TMP):
        raise Refusal(f"{path} is below {TMP}, which is each pod's own. Fix: a path elsewhere")
    return str(path)


def _run(manifests: Path, state: Path, secrets: Secrets) -> None:
    """Bring the stack up with the batch, and return when it is answered."""
    try:
        with closing(client.up(manifests, state, secrets=secrets)) as events, Board(people) as board:
            for event in events:
                if event.type == "log" and event.event:
                    board.see(event.event)
    except client.LocalError as error:
        people.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        people.print(
            "\nStopped, with all that was up. Run it again, and it goes on with the lines that have no answer."
        )
        sys.exit(INTERRUPTED)
