"""How a program of the trainer ends: its exit codes, and the one line it says when it does not end well."""

import argparse
import errno
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
_WRONG_PLACES = (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError, FileExistsError)


class Refused(ValueError):
    """Bad input or a gate: another try would fail in the same way, so the exit code is 2."""

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(f"{what} ({where}). {fix}")
        self._said = (what, where, fix)

    def __reduce__(self) -> tuple[object, ...]:
        """One process of several may refuse, and another tells it."""
        return _refused, self._said


def _refused(what: str, where: str, fix: str) -> Refused:
    return Refused(what, where=where, fix=fix)


class Failed(RuntimeError):
    """Something that may work at the next try; the exit code is 1."""

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(f"{what} ({where}). {fix}")


class RankGone(Failed):
    """Another of the `world` ranks has ended, and a collective with it."""

    def __init__(self, *, world: int) -> None:
        fix = "See the log of the rank that ended first; under torchrun all begin again from the newest checkpoint."
        super().__init__("another rank has gone", where=f"of {world}", fix=fix)


class Interrupted(Exception):
    """A signal asked for the end and all work so far is on disk; the exit code is 75."""


class Parser(argparse.ArgumentParser):
    """A command line that is refused as everything is."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise Refused(message, where="command line", fix=f"Usage: {usage}")


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the training loop can end between two steps instead of inside one."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number)


def _as_line(error: Exception) -> tuple[str, int]:
    """The sentence for a user, and whether another try could help (exit 1) or could not (exit 2)."""
    if isinstance(error, Refused):
        return str(error), REFUSED
    if isinstance(error, OSError):
        refused = isinstance(error, _WRONG_PLACES) or error.errno == errno.EROFS
        fix = (
            "Name a place that exists and that this user can write to." if refused else "Free some space and try again."
        )
        return f"{error.strerror or error} ({error.filename or 'no file named'}). {fix}", REFUSED if refused else FAILED
    return str(error), FAILED


def _is_to_tell(line: str, rank: int) -> bool:
    """Ranks meet most errors together, and some alone: under torchrun the first of a node to come tells, without it rank 0."""
    own_file = os.environ.get(
        "TORCHELASTIC_ERROR_FILE"
    )  # in a directory of the rank's, in one of this start of the node
    if own_file is None:
        return rank == 0
    try:
        (Path(own_file).parents[1] / f"told-{zlib.crc32(line.encode()):08x}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than not at all
        return True
    return True


def run_program(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs `main(arguments)` and exits by the contract. A bug (any other exception) keeps its traceback and exits 1."""
    from trainer.log import Log

    rank = int(os.environ.get("RANK", "0"))
    code = DONE
    try:
        main(sys.argv[1:])
    except Interrupted as error:
        Log(rank=rank).emit("interrupted", message=str(error))
        code = INTERRUPTED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = FAILED  # whoever read our output has gone: there is nobody to tell
    except (Refused, Failed, OSError) as error:
        line, code = _as_line(error)
        if _is_to_tell(line, rank):
            Log().emit("error", level="error", message=line)
            print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
