"""Where the text comes from: documents with a name, in a fixed order, and the side of the split each is on."""

import hashlib
import posixpath
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from trainer.config import StdlibSource, TextSource
from trainer.errors import Refused

# Not the library's own code: what was installed, what tests it, and what a program wrote (code pages, help texts, the
# build's variables), which would teach a model tables instead of Python.
_STDLIB_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass
class Corpus:
    """Documents of one source. `skipped` counts the files that are not UTF-8 (of the standard library only)."""

    source: StdlibSource | TextSource
    skipped: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.source, StdlibSource):
            root = sysconfig.get_path("stdlib")
            self._root, self._files, self._filesystem = root, _stdlib_files(Path(root)), fsspec.filesystem("file")
        else:
            self._filesystem, self._root = _open(self.source.path)
            self._files = self._text_files(self.source)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def version(self) -> str:
        """What the config does not say and the documents depend on."""
        return f"python {sys.version.split()[0]}" if isinstance(self.source, StdlibSource) else ""

    def __iter__(self) -> Iterator[Document]:
        for name in self._files:
            path = posixpath.join(self._root, name)
            raw: bytes = self._filesystem.cat_file(path)  # pyright: ignore[reportAssignmentType] - one path gives bytes
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if isinstance(self.source, StdlibSource):
                    self.skipped += 1
                    continue
                fix = (
                    f"Convert it (iconv -f latin1 -t utf-8) or leave it out with source.glob, now '{self.source.glob}'."
                )
                raise Refused(f"not UTF-8 at byte {error.start}", where=path, fix=fix) from None
            if text:
                yield Document(name, text)

    def _text_files(self, source: TextSource) -> list[str]:
        if self._filesystem.isfile(self._root):
            self._root, name = posixpath.split(self._root)
            return [name]
        pattern = posixpath.join(self._root, source.glob)
        found = [str(path) for path in self._filesystem.glob(pattern) if self._filesystem.isfile(path)]
        if not found:
            raise Refused(
                f"no file matches '{source.glob}'", where=source.path, fix="Set source.glob to what is there."
            )
        return sorted(posixpath.relpath(path, self._root) for path in found)


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        filesystem, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise Refused(f"cannot open the corpus: {error}", where=url, fix="Set source.path to an fsspec URL.") from None
    if not filesystem.exists(root):
        raise Refused("the corpus does not exist", where=url, fix="Set source.path to a file or a directory.")
    return filesystem, root


def _stdlib_files(root: Path) -> list[str]:
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (name for name in names if not _STDLIB_LEFT_OUT.intersection(name.parts))
    return sorted(name.as_posix() for name in kept if not name.name.startswith("_sysconfigdata"))


def is_held_out(name: str, *, share: float, seed: int) -> bool:
    """By a hash of the name, so that a document stays on its side when others come or go."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(documents: list[Document], *, share: float, seed: int) -> tuple[list[Document], list[Document], str]:
    """Train documents, held-out documents, and how they were parted.

    Whole documents, where there are enough of them; else the end of every document is held out.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[is_held_out(document.name, share=share, seed=seed)].append(document)
    if sides[0] and sides[1]:
        return sides[0], sides[1], "by document"
    cuts = [(document, int(len(document.text) * (1 - share))) for document in documents]
    train = [Document(document.name, document.text[:cut]) for document, cut in cuts]
    return (
        train,
        [Document(document.name, document.text[cut:]) for document, cut in cuts],
        "by the end of each document",
    )
