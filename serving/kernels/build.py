"""Compiles the C++ of this folder for the processor it runs on, once, at the first start that needs it.

The library lies beside the sources in `__pycache__`, as Python's own compiled files do, or in the user's cache where
that folder cannot be written, under a name that its sources and flags decide. Where there is no compiler the engine
computes with torch alone. `python -m serving.kernels.build` compiles for every level of processor, as an image does.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("pool.h", "tile.h", "linear.h", "attention.h", "forward.cpp")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread")
COMPILE_TIMEOUT_S = 120
# Best first: (what /proc/cpuinfo must say, the compiler's flags).
LEVELS: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}), ("-march=x86-64-v4", "-mavx512bf16")),
    (frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}), ("-march=x86-64-v4",)),
    (frozenset({"avx2", "fma", "bmi2", "f16c"}), ("-march=x86-64-v3",)),
)


class Unavailable(RuntimeError):
    """No library can be had here; the message says why, in a few words."""


def library() -> ctypes.CDLL:
    """The library for this processor, compiled when it is not there yet. Raises `Unavailable`."""
    flags = _level()
    name = f"slipway-{_digest(flags)}.so"
    for folder in _folders():
        if (folder / name).is_file():
            return _open(folder / name)
    return _open(_compile(name, flags))


def _level() -> tuple[str, ...]:
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise Unavailable(f"not written for {platform.machine()} on {sys.platform}")
    words = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    for needs, flags in LEVELS:
        if needs <= set(words):
            return flags
    raise Unavailable("the processor has no AVX2")


def _digest(flags: tuple[str, ...]) -> str:
    if not all((HERE / source).is_file() for source in SOURCES):
        raise Unavailable("the kernels' sources are not installed")
    text = b"".join((HERE / source).read_bytes() for source in SOURCES) + " ".join((*FLAGS, *flags)).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def _folders() -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return HERE / "__pycache__", cache / "slipway" / "kernels"


def _compile(name: str, flags: tuple[str, ...]) -> Path:
    """Compiles into the first folder that can be written. Who comes while another process compiles waits for it."""
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / f"{name}.lock").open("w")
        except OSError:
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
            if not (folder / name).is_file():
                _compile_to(folder / name, flags)
        return folder / name
    raise Unavailable("there is no folder to compile into")


def _compile_to(path: Path, flags: tuple[str, ...]) -> None:
    """`path` appears whole, for every user to read."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("there is no C++ compiler")
    made = path.with_suffix(".part.so")
    sources = [str(HERE / source) for source in SOURCES if source.endswith(".cpp")]
    try:
        command = [compiler, *FLAGS, *flags, *sources, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)  # noqa: S603
        made.chmod(0o755)
        made.replace(path)
    except (OSError, subprocess.SubprocessError) as error:
        made.unlink(missing_ok=True)
        said = getattr(error, "stderr", None) or str(error).encode()
        raise Unavailable(f"{compiler} failed: {said.decode(errors='replace').strip()[:300]}") from None


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(str(error)) from None


if __name__ == "__main__":
    try:
        for _, level in LEVELS:
            print(_compile(f"slipway-{_digest(level)}.so", level))
    except Unavailable as error:
        sys.exit(f"error: {error} ({HERE}). Install g++ 12 or newer")
