"""Compiles the C++ of this folder for the processor it runs on, once, at the first start that needs it.

The library lies in `__pycache__` beside the sources, or in the user's cache where that cannot be written, under a name that
sources and flags decide. Where there is no compiler the trainer computes with torch alone. `python -m trainer.kernels.build`
compiles for every level of processor, as an image does.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_HEADERS, _UNITS = ("products.h", "rows.h", "attention.h"), ("adamw.cpp", "decoder.cpp", "meet.cpp")
_FLAGS = ("-std=gnu++17", "-O3", "-fno-math-errno", "-fPIC", "-fopenmp")
_COMPILE_TIMEOUT_S = 120
_LEVELS = {"x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "x86-64-v3": {"avx2", "fma", "bmi2", "f16c"}}
"""Of processors, best first, with the words in /proc/cpuinfo that tell them."""


class Unavailable(RuntimeError):
    """No library can be had here; the message says why, in a few words."""


@cache
def library() -> ctypes.CDLL:
    """The library for this processor, compiled when it is not there yet. Raises Unavailable."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"not written for {platform.machine()} on {sys.platform}")
    words = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split())
    level = next((level for level, needs in _LEVELS.items() if needs <= words), None)
    if level is None:
        raise Unavailable("the processor has no AVX2")
    try:
        # With torch's own OpenMP, which is loaded: a second one would have threads of its own.
        return ctypes.CDLL(str(_compiled(level)))
    except OSError as error:
        raise Unavailable(str(error)) from None


def _compiled(level: str) -> Path:
    """Who comes while another process compiles waits for it."""
    text = b"".join((_HERE / source).read_bytes() for source in (*_HEADERS, *_UNITS))
    name = f"slipway-{hashlib.sha256(text + ' '.join((*_FLAGS, level)).encode()).hexdigest()[:16]}.so"
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = (_HERE / "__pycache__", cache_home / "slipway" / "kernels")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / f"{name}.lock").open("w")
        except OSError:
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
            if not (folder / name).is_file():
                _compile(folder / name, level)
        return folder / name
    raise Unavailable("there is no folder to compile into")


def _compile(path: Path, level: str) -> None:
    """`path` appears whole, for every user to read."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("there is no C++ compiler")
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        built, flags = f"{directory}/slipway.so", (*_FLAGS, f"-march={level}")
        made = {unit: f"{directory}/{unit}.o" for unit in _UNITS}
        commands = [[compiler, *flags, "-c", str(_HERE / unit), "-o", made[unit]] for unit in _UNITS]
        # Linked without -fopenmp, which would name a library of the compiler's.
        commands.append([compiler, "-shared", *made.values(), "-o", built])
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)  # noqa: S603
            Path(built).chmod(0o755)
            Path(built).replace(path)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            raise Unavailable(f"{compiler} failed: {said.decode(errors='replace').strip()[:300]}") from None


if __name__ == "__main__":
    try:
        for each in _LEVELS:
            print(_compiled(each))
    except Unavailable as error:
        sys.exit(f"error: {error} ({_HERE}). Install g++ 12 or newer.")
