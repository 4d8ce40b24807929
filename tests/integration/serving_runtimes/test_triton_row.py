"""The runtimes table's row of Triton, held against a real one: the server in NVIDIA's `nvidia-pytriton` wheel, on a CPU.

The wheel asks for a NumPy that this project is past, so it is put beside it. Command, ports, probes and metric names are
those that a pod of a service gets; added are only the places where the wheel keeps its backends, and this machine's
loopback.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import psutil
import pytest

from infra.components.server import command
from infra.spec.runtimes import PLACEHOLDERS, Runtime, builtin
from tests.beside import installed_beside
from tests.ports import free_ports

START_TIMEOUT_S = 120
DRAIN_S = 30
FACTS = tomllib.loads((Path(__file__).parents[2] / "unit/components/runtime_facts.toml").read_text())["triton"]
CONFIG = """
backend: "python"
input [{name: "SECONDS" data_type: TYPE_FP32 dims: [1]}]
output [{name: "WAITED" data_type: TYPE_FP32 dims: [1]}]
"""
MODEL = '''
import time

import numpy as np
import triton_python_backend_utils as utils


class TritonPythonModel:
    """Waits for as long as it is told."""

    def execute(self, requests):
        asked = [float(utils.get_input_tensor_by_name(request, "SECONDS").as_numpy()[0]) for request in requests]
        time.sleep(max(asked))
        # By DLPack: the wheel was built for NumPy 1, whose arrays are laid out otherwise.
        waited = [utils.Tensor.from_dlpack("WAITED", np.array([seconds], dtype=np.float32)) for seconds in asked]
        return [utils.InferenceResponse([each]) for each in waited]
'''


class Triton(NamedTuple):
    process: "subprocess.Popen[bytes]"
    row: Runtime
    port: int
    metrics_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> bool:
        try:
            return httpx.get(self.url + self.row.ready).status_code == 200
        except httpx.TransportError:
            return False

    def infer(self, seconds: float) -> httpx.Response:
        given = {"name": "SECONDS", "shape": [1], "datatype": "FP32", "data": [seconds]}
        return httpx.post(f"{self.url}/v2/models/waits/infer", json={"inputs": [given]}, timeout=60)


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[Triton]:
    package = installed_beside("nvidia-pytriton", dependencies=False) / "pytriton"
    server = package / "tritonserver"
    backends = shutil.copytree(server / "backends", tmp_path / "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / f"python_backend_stubs/{version}/triton_python_backend_stub", backends / "python")
    model = tmp_path / "models" / "waits"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    # The program has a Python of its own, which knows nothing of this one's packages.
    (model / "1" / "model.py").write_text(
        f"import sys\nsys.path.append({str(Path(np.__file__).parents[1])!r})\n{MODEL}"
    )
    row, (port, metrics_port) = builtin()["triton"], free_ports(2)
    values = dict.fromkeys(PLACEHOLDERS) | {
        "model": str(model.parent), "port": port, "metrics_port": metrics_port, "drain_s": DRAIN_S,
    }  # fmt: skip
    program, *words = command(row, values)
    assert program == "tritonserver"
    places = [f"--backend-directory={backends}", f"--cache-directory={server / 'caches'}", "--http-address=127.0.0.1"]
    log = tmp_path / "triton.log"
    env = {**os.environ, "LD_LIBRARY_PATH": str(package.with_name("nvidia_pytriton.libs"))}  # for the copied program
    with log.open("w") as out:
        process = subprocess.Popen([server / "bin" / program, *words, *places], env=env, stdout=out, stderr=out)
    found = Triton(process, row, port, metrics_port)
    try:
        end_s = time.monotonic() + START_TIMEOUT_S
        while not found.ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)
        yield found
    finally:
        process.kill()
        process.wait()


def test_the_row_is_true_of_a_real_server(triton: Triton) -> None:
    for path in (triton.row.live, triton.row.ready):
        assert httpx.get(triton.url + path).status_code == 200
    answer = triton.infer(0.0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == [0.0]
    assert any("/v2/models/waits/infer".startswith(path) for path in triton.row.paths)
    metrics = httpx.get(f"http://127.0.0.1:{triton.metrics_port}{triton.row.metrics.path}").text
    kinds = dict(line.split()[2:4] for line in metrics.splitlines() if line.startswith("# TYPE"))
    assert set(triton.row.metrics.names.values()) <= kinds.keys()
    documented = {name: kind.split(",")[0] for name, kind in FACTS["metrics"].items()}
    assert {name: kind for name, kind in kinds.items() if name in documented}.items() <= documented.items()
    listening = {
        each.laddr.port for each in psutil.Process(triton.process.pid).net_connections("tcp") if not each.raddr
    }
    assert listening == {triton.port, triton.metrics_port}  # no gRPC beside them


def test_what_waits_is_counted_and_what_runs_is_finished_before_it_ends(triton: Triton) -> None:
    def waiting() -> float:
        metrics = httpx.get(f"http://127.0.0.1:{triton.metrics_port}/metrics").text
        name = triton.row.metrics.names["slipway_serve_requests_waiting"]
        return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name + "{"))

    assert triton.row.drains
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(triton.infer, 1.0) for _ in range(3)]  # one runs, and the others wait for it
        end_s = time.monotonic() + START_TIMEOUT_S
        while waiting() < len(asked) - 1:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        triton.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in asked] == [200, 200, 200]
    assert triton.process.wait(timeout=DRAIN_S) == 0
