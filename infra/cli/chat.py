"""`slipway chat`: talk to a served model through the stack's router, on this machine or on a cluster."""

import json as jsonlib
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from infra.apply import ApiError
from infra.cli.apply import Kubeconfig
from infra.cli.local import API_KEY, INTERRUPTED
from infra.cli.project import Refusal, StackName, me, people, stack_file
from infra.cli.target import cluster_of, local_state, told
from infra.live.endpoint import endpoint
from infra.local import client
from infra.spec import Service, Stack, load, unknown

ANSWER_S = 120.0
Message = dict[str, str]


def chat(
    message: Annotated[str | None, typer.Argument(help="Say this and end; without it, a conversation.")] = None,
    stack: StackName = "local",
    kubeconfig: Kubeconfig = None,
    service: Annotated[str | None, typer.Option("--service", help="Service to talk to. Default: the first.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Endpoint, where it is none of the stack's own.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2)] = 0.7,
    key: Annotated[
        str | None, typer.Option("--key", envvar=API_KEY, help="API key, where the service asks for one.")
    ] = None,
) -> None:
    """Talk to a model of the stack; answers stream as they are written.

    Ctrl-D or an empty line ends a conversation. The answer goes to stdout, so `slipway chat "…" | …` works.
    """
    spec = load(stack_file(stack))
    talks_to = _service(spec, service)
    said: list[Message] = [{"role": "system", "content": system}] if system else []
    settings = {"model": talks_to.model, "max_tokens": max_tokens, "temperature": temperature}
    try:
        with told(stack, spec.platform.namespace), _endpoint(spec, stack, kubeconfig, url) as base:
            for line in [message] if message is not None else _lines():
                said.append({"role": "user", "content": line})
                answer = ""
                for piece in stream(base, said, settings, key=key):
                    answer += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                sys.stdout.write("\n")
                said.append({"role": "assistant", "content": answer})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def stream(base: str, messages: list[Message], settings: dict[str, Any], *, key: str | None) -> Iterator[str]:
    """Pieces of the answer as they come. Raises `ApiError` with what the server says where it refuses."""
    import httpx  # here: every other command would start 0.1 s later

    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = settings | {"messages": messages, "stream": True}
    address = f"{base.rstrip('/')}/v1/chat/completions"
    try:
        with httpx.stream("POST", address, json=body, headers=headers, timeout=ANSWER_S, trust_env=False) as response:
            if response.status_code != 200:
                raise ApiError(_refused(response.status_code, response.read()), status=0)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = jsonlib.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ApiError(f"the answer broke off: {chunk['error']['message']}. Fix: ask again", status=0)
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise ApiError(f"the endpoint does not answer: {error} ({address}). Fix: {me()} status", status=0) from None


def _refused(status: int, body: bytes) -> str:
    try:
        message = jsonlib.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace").strip()[:200] or "no reason given"
    fix = {
        401: "--key KEY, or SLIPWAY_API_KEY",
        404: "is the model published? See status",
        429: "it is at its limit; try again shortly",
        503: "it is loading, or waits until the channel has a model; see status",
    }.get(status, "see its logs")
    return f"the server answers {status}: {message}. Fix: {fix}"


def _service(spec: Stack, name: str | None) -> Service:
    if not spec.services:
        raise Refusal("the stack serves nothing. Fix: add a service to the stack file")
    found = next((service for service in spec.services if name in (None, service.name)), None)
    if found is None:
        raise Refusal(f"{unknown('service', str(name), [s.name for s in spec.services])}. Fix: --service NAME")
    return found


@contextmanager
def _endpoint(spec: Stack, stack: str, kubeconfig: Path | None, url: str | None) -> Generator[str]:
    """URL of the router: the one given, the one published here, else the cluster's, by a forwarded port where it is inside."""
    if url:
        yield url
    elif state := local_state(stack, kubeconfig):
        found = next((workload.url for workload in client.status(state).workloads if workload.url), None)
        if found is None:
            raise Refusal(f"no endpoint is published here. Fix: {me()} local status -s {stack}")
        yield found
    else:
        with endpoint(cluster_of(kubeconfig), namespace=spec.platform.namespace) as found:
            yield found


def _lines() -> Iterator[str]:
    """What a person says, line by line; what is piped in is one message a line."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            people.print(Text("> ", style="bold cyan"), end="")
        line = sys.stdin.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()
