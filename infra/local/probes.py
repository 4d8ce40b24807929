"""Startup, readiness and liveness probes of one container, as the kubelet asks them."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx

from infra.local.addresses import LOOPBACK
from infra.local.plan import ContainerPlan, Probe
from infra.local.processes import Reaper, spawn


class Prober:
    """Runs a container's probes for as long as `run` does, telling `on_ready` and returning why it is to be killed."""

    def __init__(self, plan: ContainerPlan, *, env: dict[str, str], reaper: Reaper) -> None:
        self._plan, self._env, self._reaper = plan, env, reaper

    async def run(self, on_ready: Callable[[bool, str], None]) -> str:
        """Returns, with the reason, when the startup or the liveness probe has failed for good; otherwise never."""
        # The proxies of the environment are not for 127.0.0.1, and the kubelet checks no certificate.
        async with httpx.AsyncClient(trust_env=False, verify=False) as self._http:  # noqa: S501
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
        except (OSError, httpx.HTTPError):
            return f"nothing answers at port {probe.port}"

    async def _get(self, probe: Probe) -> str | None:
        url = f"{probe.scheme}://{LOOPBACK}:{probe.port}/{probe.path.lstrip('/')}"
        # A connection for each probe, as the kubelet does: a kept one would hide that nothing accepts new ones.
        headers = {"User-Agent": "kube-probe/slipway", "Connection": "close"} | probe.headers
        answer = await self._http.get(url, headers=headers, timeout=None)
        return None if 200 <= answer.status_code < 400 else f"GET {probe.path} said {answer.status_code}"

    async def _exec(self, argv: list[str]) -> str | None:
        code = await run_to_end(argv, env=self._env, cwd=self._plan.cwd, reaper=self._reaper)
        return None if code == 0 else f"{argv[0]} exited {code}"


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
