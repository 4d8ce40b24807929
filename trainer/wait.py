"""`python -m trainer.wait PATH… [--timeout S]`: ends when every path exists; what a later stage waits for."""

import time
from pathlib import Path

from trainer.errors import Failed, Parser, run_program
from trainer.log import Log

_POLL_S = 0.2
_TELL_EVERY_S = 30.0


def wait_for(paths: list[Path], *, timeout_s: float | None, log: Log) -> None:
    """Returns once every path exists. Raises Failed, naming one that does not, after `timeout_s`."""
    begun_s = told_s = time.monotonic()
    while missing := [path for path in paths if not path.exists()]:
        now_s = time.monotonic()
        if timeout_s is not None and now_s - begun_s >= timeout_s:
            fix = "See the log of the program that makes it, or give a longer --timeout."
            raise Failed(f"not there after {timeout_s:g} s", where=str(missing[0]), fix=fix)
        if now_s - told_s >= _TELL_EVERY_S:
            log.emit("waiting", path=str(missing[0]), seconds=round(now_s - begun_s))
            told_s = now_s
        time.sleep(_POLL_S)
    log.emit("done", stage="wait", seconds=round(time.monotonic() - begun_s, 2), skipped=False)


def main(arguments: list[str]) -> None:
    parser = Parser(
        usage="python -m trainer.wait PATH… [--timeout S]", prog="python -m trainer.wait", description=__doc__
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--timeout", type=float, default=None, metavar="S", help="seconds; for ever when not given")
    options = parser.parse_args(arguments)
    wait_for(options.paths, timeout_s=options.timeout, log=Log())


if __name__ == "__main__":
    run_program(main)
