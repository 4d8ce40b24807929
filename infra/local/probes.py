"""Startup, readiness and liveness probes of one container, as the kubelet asks them."""

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

from infra.local.addresses import LOOPBACK
from infra.local.plan import ContainerPlan, Probe
from infra.local.processes import Reaper, spawn


class Prober:
    """Runs a container's probes for as long as `run` does, telling `on_ready` and returning why it is to be killed."""

    def __init__(self, plan: ContainerPlan, *, env: dict[str, str], reaper: Reaper) -> None:
        self._plan, self._env, self._reaper = plan, env, reaper

    async def run(self, on_ready: Callable[[bool, str], None]) -> str:
        """Returns, with the reason, when the startup or the liveness probe has failed for good; otherwise never."""
        if self._plan.startup:
            on_ready(False, "starting")
            failed = await self._until_started(self._plan.startup, on_ready)
            if failed:
                return f"startup probe failed: {failed}"
        readiness = asyncio.create_task(self._watch_readiness(on_ready))
        try:
            return await self._watch_liveness()
        finally:
            readiness.cancel()
            await asyncio.gather(readiness, return_exceptions=True)

    async def _until_started(self, probe: Probe, on_ready: Callable[[bool, str], None]) -> str | None:
        await asyncio.sleep(probe.initial_delay_s)
        why: str | None = None
        for _ in range(probe.failure_threshold):
            why = await self.ask(probe)
            if why is None:
                return None
            on_ready(False, f"starting: {why}")
            await asyncio.sleep(probe.period_s)
        return why

    async def _watch_readiness(self, on_ready: Callable[[bool, str], None]) -> None:
        probe = self._plan.readiness
        if probe is None:
            on_ready(True, "")
            return
        on_ready(False, "waiting for the readiness probe")
        await asyncio.sleep(probe.initial_delay_s)
        ready, times = False, 0  # `times` answers in a row speak against `ready`
        while True:
            why = await self.ask(probe)
            times = times + 1 if (why is None) != ready else 0
            if times >= (probe.failure_threshold if ready else probe.success_threshold):
                ready, times = not ready, 0
            on_ready(ready, "" if ready else f"not ready: {why or 'ready for too short a time'}")
            await asyncio.sleep(probe.period_s)

    async def _watch_liveness(self) -> str:
        probe = self._plan.liveness
        if probe is None:
            await asyncio.Event().wait()
            raise AssertionError("nothing sets this event")
        await asyncio.sleep(probe.initial_delay_s)
        failures = 0
        while True:
            why = await self.ask(probe)
            failures = failures + 1 if why else 0
            if why and failures >= probe.failure_threshold:
                return f"liveness probe failed: {why}"
            await asyncio.sleep(probe.period_s)

    async def ask(self, probe: Probe) -> str | None:
        """None when the probe succeeds; otherwise why not, in words."""
        try:
            async with asyncio.timeout(probe.timeout_s):
                match probe.kind:
                    case "http":
                        return await self._get(probe)
                    case "tcp":
                        _, writer = await asyncio.open_connection(LOOPBACK, probe.port)
                        writer.close()
                        return None
                    case _:
                        return await self._exec(probe.argv)
        except TimeoutError:
            return f"no answer in {probe.timeout_s:g} s"
        except OSError:
            return f"nothing answers at port {probe.port}"

    async def _get(self, probe: Probe) -> str | None:
        """The status line is all that counts. A connection of its own, as a kept one would hide that no new one is taken."""
        tls = _any_certificate() if probe.scheme == "https" else None
        reader, writer = await asyncio.open_connection(LOOPBACK, probe.port, ssl=tls)
        try:
            headers = {"Host": f"{LOOPBACK}:{probe.port}", "User-Agent": "kube-probe/slipway", "Accept": "*/*"}
            headers |= probe.headers | {"Connection": "close"}
            lines = [f"GET /{probe.path.lstrip('/')} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
            writer.write("\r\n".join(lines).encode())
            words = (await reader.read(2**10)).split(b"\r\n", 1)[0].split()
        finally:
            writer.close()
        if len(words) < 2 or not words[1].isdigit():
            return f"what answers at port {probe.port} does not speak HTTP"
        return None if 200 <= int(words[1]) < 400 else f"GET {probe.path} said {words[1].decode()}"

    async def _exec(self, argv: list[str]) -> str | None:
        try:
            code = await run_to_end(argv, env=self._env, cwd=self._plan.cwd, reaper=self._reaper)
        except OSError as error:
            return f"cannot run {argv[0]}: {error.strerror}"
        return None if code == 0 else f"{argv[0]} exited {code}"


def _any_certificate() -> ssl.SSLContext:
    """The kubelet does not verify the certificate of what it probes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def run_to_end(argv: list[str], *, env: dict[str, str], cwd: Path, reaper: Reaper) -> int:
    """Run a probe's or a hook's command; it is killed, with its children, when the caller is cancelled."""
    process = spawn(argv, env=env, cwd=cwd)
    try:
        return await reaper.wait(process)
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL what is left of a process's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
