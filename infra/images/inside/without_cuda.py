"""torch from PyPI on machines without a GPU: the same torch, and stand-ins for the CUDA libraries that it is linked to.

On Linux PyPI has torch for CUDA alone, which loads 3 GB of libraries that a CPU never calls. The loader wants each library to
be there, by name, with the symbols that torch refers to: libraries of a few KB, whose functions end the process, will do.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

NEVER = "sys_platform == 'none'"
# Kept: what torch calls as it is loaded (the runtime and the profiler, 7 MB).
OVERRIDES = [
    "cuda-toolkit[cudart,cupti]",
    *(f"nvidia-{name}-cu13 ; {NEVER}" for name in ("cudnn", "cusparselt", "nccl")),
    *(f"{name} ; {NEVER}" for name in ("nvidia-nvshmem-cu13", "cuda-bindings", "triton")),
]
# Library → how its symbols begin; longer beginnings first, since some are the beginning of others'.
LIBRARIES = {
    "libcublasLt": "cublasLt",
    "libcublas": "cublas",
    "libcudnn": "cudnn",
    "libcufft": "cufft",
    "libcufile": "cuFile",
    "libcusolver": "cusolver",
    "libcusparseLt": "cusparseLt",
    "libcusparse": "cusparse",
    "libnccl": "nccl",
    "libnvrtc": "nvrtc",
    "libnvshmem_host": "nvshmem",
}


def stand_in(folder: Path) -> None:
    """Make the libraries that those of torch in `folder` want and that are not there, beside them."""
    symbols = _wanted_symbols(folder)
    for name in sorted(_wanted_libraries(folder)):
        _library(folder / name, symbols[name.split(".so")[0]])


def _wanted_libraries(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.so*"):
        found.update(re.findall(r"NEEDED.*\[(.+)\]", _output("readelf", "--wide", "--dynamic", str(path))))
    return {name for name in found if name.split(".so")[0] in LIBRARIES}


def _wanted_symbols(folder: Path) -> dict[str, dict[str, set[str]]]:
    """Library → version of symbols (empty for none) → symbols."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in folder.glob("*.so*"):
        for line in _output("nm", "--dynamic", "--undefined-only", str(path)).splitlines():
            symbol, _, version = line.split()[-1].replace("@@", "@").partition("@")
            library = next((name for name, start in LIBRARIES.items() if symbol.startswith(start)), None)
            if library:
                found[library][version].add(symbol)
    return found


def _library(path: Path, symbols: dict[str, set[str]]) -> None:
    source, versions = path.with_suffix(".c"), path.with_suffix(".map")
    names = sorted({name for some in symbols.values() for name in some})
    source.write_text("".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names))
    versions.write_text("".join(f"{version} {{ global: *; }};\n" for version in sorted(symbols) if version))
    script = [f"-Wl,--version-script={versions}"] if any(symbols) else []
    command = ["gcc", "-shared", "-fPIC", "-w", "-s", f"-Wl,-soname,{path.name}", *script, "-o", str(path), str(source)]
    subprocess.run(command, check=True)  # noqa: S603
    source.unlink()
    versions.unlink()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
