"""Opening files that are packed, as their names say, so that one that is cut is told and not taken for whole."""

import io
import lzma
import zlib
from gzip import BadGzipFile
from typing import IO

import pyarrow as pa
from fsspec import AbstractFileSystem

from trainer.errors import Refused

# What tells of packed files that are cut or damaged; gzip, bz2 and pyarrow also have an OSError without a number for it.
PACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError)


def open_packed(filesystem: AbstractFileSystem, path: str) -> IO[bytes]:
    """The content of a file, unpacked; of .zst by pyarrow, since fsspec's own cannot be read by lines nor sees a cut."""
    if path.endswith(".zst"):
        packed = pa.PythonFile(filesystem.open(path, "rb"), mode="r")
        return io.BufferedReader(pa.CompressedInputStream(packed, "zstd"))  # pyright: ignore[reportArgumentType]
    return filesystem.open(path, "rb", compression="infer")  # pyright: ignore[reportReturnType]


def damaged(path: str, error: Exception) -> Exception:
    """What is wrong with a file; what is wrong with where it lies stays as it is: that has a number or a class of its own."""
    if isinstance(error, OSError) and (error.errno is not None or type(error) not in (OSError, BadGzipFile)):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return Refused(f"cannot be read: {reason}", where=path, fix="Write the file again.")
