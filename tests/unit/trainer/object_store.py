"""An object store as strict as the strictest: it has no directories, and never renames, copies or appends."""

from typing import Any, ClassVar, NoReturn

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """`bucket://…`, in this process."""

    protocol = ("bucket",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("bucket://"))

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        assert mode in ("rb", "wb"), f"{path} cannot be opened with {mode}"
        return super()._open(path, mode, **more)

    def mkdir(self, path: str, create_parents: bool = True, **_more: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def rmdir(self, path: str) -> None: ...

    def cp_file(self, path1: str, path2: str, **_more: Any) -> NoReturn:
        raise NotImplementedError(f"{path1} cannot become {path2}")

    mv = cp_file


fsspec.register_implementation("bucket", ObjectStore, clobber=True)
