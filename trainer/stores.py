"""Places that a URL names and fsspec opens: a directory, or an object store whose library has errors of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainer.errors import Failed, Refused


def open_store(url: str, *, what: str, key: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path in it. Raises Refused for one that fsspec cannot open."""
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:
        fix = f"Set {key} to a directory or an fsspec URL."
        raise Refused(f"cannot open the {what}: {error}", where=url, fix=fix) from None


def is_local(filesystem: Any) -> bool:
    """Whether it can rename and be forced to the disk."""
    return isinstance(filesystem, LocalFileSystem)


@contextmanager
def answering(url: str, *, what: str) -> Iterator[None]:
    """Raises Failed where the store's library says in its own way that it got no answer; what is wrong with a file is told as that."""
    try:
        yield
    except (ValueError, Failed, OSError):
        raise
    except Exception as error:
        if "://" not in url:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "See that it can be reached, and the credentials in the environment."
        raise Failed(f"the {what} does not answer: {reason}", where=url, fix=fix) from None
