"""What a probe takes for an answer."""

import asyncio
import socket
from pathlib import Path

import pytest

from infra.local.plan import ContainerPlan, Probe
from infra.local.probes import Prober
from infra.local.processes import Reaper

PLAN = ContainerPlan("c", ["true"], {}, Path("/"), None, None, None, 0, [])


def ask(probe: Probe, plan: ContainerPlan = PLAN) -> str | None:
    async def asking() -> str | None:
        reaper = Reaper()
        reaper.install()
        return await Prober(plan, env={"PATH": "/usr/bin:/bin"}, reaper=reaper).ask(probe)

    return asyncio.run(asking())


async def _against(answer: bytes, probe: Probe) -> tuple[str | None, bytes]:
    """What the probe makes of a server that sends `answer`, and what it had asked."""
    asked = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked = await reader.read(2**16)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    said = await Prober(PLAN, env={}, reaper=Reaper()).ask(
        Probe(kind="http", port=port, path=probe.path, headers=probe.headers)
    )
    server.close()
    return said, asked


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.1 302 Found\r\n\r\n", None),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", "GET /ready said 404"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "GET /ready said 503"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
    ],
)
def test_the_status_decides(answer: bytes, said: str | None):
    why, asked = asyncio.run(_against(answer, Probe(kind="http", path="/ready", headers={"X-A": "b"})))
    assert why is None if said is None else said in (why or "")
    assert asked.startswith(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-A: b\r\n" in asked
    assert asked.endswith(b"\r\n\r\n")


def test_tcp_and_silence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ask(Probe(kind="tcp", port=port)) is None
        assert ask(Probe(kind="http", port=port, timeout_s=0.1)) == "no answer in 0.1 s"
    assert ask(Probe(kind="tcp", port=port)) == f"nothing answers at port {port}"


def test_exec():
    assert ask(Probe(kind="exec", argv=["true"])) is None
    assert ask(Probe(kind="exec", argv=["sh", "-c", "exit 3"])) == "sh exited 3"
    assert ask(Probe(kind="exec", argv=["sleep", "60"], timeout_s=0.1)) == "no answer in 0.1 s"
    assert "cannot run no-such-program" in (ask(Probe(kind="exec", argv=["no-such-program"])) or "")
