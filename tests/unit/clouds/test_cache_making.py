"""Folders of the cache appear whole or not at all, however many make them, and whatever happens to who makes them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.clouds.local.making import making, tied

ROOT = Path(__file__).parents[3]
WITHIN_S = 30.0
# Makes a folder of one file by a program that has children, and never ends.
MAKER = """
import subprocess, sys
from pathlib import Path
from infra.clouds.local.making import making, tied
with making(Path(sys.argv[1])) as part:
    (part / "half").write_text("made")
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', 'of-' + sys.argv[1]])"
    subprocess.run(tied(sys.executable, "-c", child, sys.argv[2]))
"""


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(word: str) -> list[int]:
    """Ids of the processes whose last word is `word`."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            continue
        if words[-1] == word.encode():
            found.append(int(folder.name))
    return found


def test_who_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tools"

    def make() -> None:
        with making(folder) as part:
            assert part is not None
            (part / "half").write_text("made")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        make()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_of_several_at_once_one_makes_it_and_all_have_it(tmp_path: Path) -> None:
    folder = tmp_path / "tools"
    made: list[int] = []

    def make(index: int) -> str:
        with making(folder) as part:
            if part is not None:
                made.append(index)
                (part / "file").write_text(str(index))
        return (folder / "file").read_text()

    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(make, range(8)))
    assert len(made) == 1
    assert set(read) == {str(made[0])}


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("setpriv"),
    reason="needs Linux, root and setpriv, which tie processes to one another",
)
def test_who_is_killed_takes_its_programs_along_and_the_next_begins_anew(tmp_path: Path) -> None:
    folder, name = tmp_path / "tools", f"maker-{tmp_path.name}-{os.getpid()}"
    command = [sys.executable, "-c", MAKER, str(folder), name]
    with subprocess.Popen(command, cwd=ROOT) as maker:
        try:
            until(lambda: bool(processes_of(f"of-{name}")))
        finally:
            maker.kill()
    until(lambda: not processes_of(f"of-{name}") and not processes_of(name))
    assert not folder.exists()
    with making(folder) as part:
        assert part is not None
        assert list(part.iterdir()) == []
    assert folder.is_dir()


def test_a_tied_program_says_what_it_says_and_ends_as_it_ends() -> None:
    done = subprocess.run(tied(sys.executable, "-c", "print('here'); exit(3)"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "here\n")
