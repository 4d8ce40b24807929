"""Opening files that are packed, as their names say, so that one that is cut is told and not taken for whole."""

import io
import lzma
import zlib
from gzip import BadGzipFile
from typing import IO, Any

from fsspec import AbstractFileSystem

from trainer.errors import Refused

_READ_BYTES = 1 << 17


def open_packed(filesystem: AbstractFileSystem, path: str) -> IO[bytes]:
    """The content of a file, unpacked. Of .zst fsspec's own can neither be read by lines nor sees a cut."""
    if path.endswith(".zst"):
        return io.BufferedReader(_Frames(filesystem.open(path, "rb"), path))
    return filesystem.open(path, "rb", compression="infer")  # pyright: ignore[reportReturnType]


def packing_errors() -> tuple[type[Exception], ...]:
    """What tells of packed files that are cut or damaged; gzip and bz2 also have an OSError without a number for it."""
    found: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError)
    try:
        from zstandard import ZstdError
    except ImportError:
        return found
    return (*found, ZstdError)


def damaged(path: str, error: Exception) -> Exception:
    """What is wrong with a file; what is wrong with where it lies stays as it is: that has a number or a class of its own."""
    if isinstance(error, OSError) and (error.errno is not None or type(error) not in (OSError, BadGzipFile)):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return Refused(f"cannot be read: {reason}", where=path, fix="Write the file again.")


class _Frames(io.RawIOBase):
    """The frames of a .zst file, one after another. Raises Refused where zstandard is not installed."""

    def __init__(self, packed: Any, path: str) -> None:
        try:
            from zstandard import ZstdDecompressor
        except ImportError:
            fix = "Install it: pip install zstandard."
            raise Refused("files that end in .zst need zstandard", where=path, fix=fix) from None
        self._packed, self._unpack = packed, ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._rest = self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            block = self._rest or self._packed.read(_READ_BYTES)
            if not block and self._frame is not None:
                raise EOFError("Compressed file ended before the end of its last frame")
            if not block:
                return 0
            self._frame = self._frame or self._unpack()
            self._out, self._rest = self._frame.decompress(block), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()
