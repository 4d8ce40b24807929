"""`python -m trainer.launch [torchrun's flags] -- ARG…`: the trainer under torchrun, by the contract's exit codes.

torchrun itself exits 1 whatever its ranks exited with, and restarts ranks that refused their config. Here a config is
validated before any rank is started or waited for, and the ranks' own code is kept.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.command import read_train_command
from trainer.config import TrainConfig
from trainer.errors import REFUSED, Failed, Interrupted, Refused, run_program
from trainer.layout import layout_of

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

_USAGE = "python -m trainer.launch [torchrun's flags] -- --config FILE data=DIR run=DIR [key=value …]"


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(
            f"usage: {_USAGE}\n\nThe flags are those of torchrun --help, the words those of python -m trainer --help."
        )
        return
    if "--" not in arguments:
        raise Refused(
            "there is no '--' between torchrun's flags and the trainer's", where="command line", fix=f"Usage: {_USAGE}"
        )
    at = arguments.index("--")
    flags, trainer_arguments = arguments[:at], arguments[at + 1 :]
    config, places = read_train_command(trainer_arguments)
    if not (Path(places["data"]) / "manifest.json").is_file():
        raise Refused("there is no dataset", where=places["data"], fix="Make it with python -m trainer.data.")
    _launch(flags, trainer_arguments, config)


def _launch(flags: list[str], trainer_arguments: list[str], config: TrainConfig) -> None:
    # Of a peer that has gone it would print frames of C++ as a warning; what is an error is told by us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.run import config_from_args, get_args_parser  # it takes seconds, which a refusal need not

    parser = get_args_parser()
    parser.error = _refuse
    options = parser.parse_args([*flags, "-m", "trainer", *trainer_arguments])
    if options.standalone:
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", str(os.getpid())
    try:
        launch_config, command, command_arguments = config_from_args(options)
    except ValueError as error:
        _refuse(str(error))
    if launch_config.min_nodes == launch_config.max_nodes:  # else the world is known only after the rendezvous
        layout_of(config, world=launch_config.max_nodes * launch_config.nproc_per_node)
    run_node(launch_config, command, *command_arguments)


def _refuse(message: str) -> NoReturn:
    raise Refused(message.rstrip("."), where="torchrun's flags", fix=f"Usage: {_USAGE}")


def run_node(config: "LaunchConfig", entry: Callable[..., None] | str | None, *arguments: Any) -> None:
    """The ranks of one node, until all have ended well; `entry` is a command or a function.

    Raises Interrupted where they were stopped, and Failed where one failed or the other nodes were lost.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    from trainer.agent import LOST, Agent

    api.LocalElasticAgent = Agent  # pyright: ignore[reportPrivateImportUsage]  # there is no argument for another
    try:
        api.elastic_launch(config, entry)(*arguments)
    except SignalException as signal:
        raise Interrupted(f"the ranks were stopped by {signal.sigval.name}") from None
    except ChildFailedError as error:
        raise _as_ours(error) from None
    except LOST as error:
        fix = "See the logs of the other launchers; the next start goes on from the newest checkpoint."
        reason = str(error).split(". See inner")[0].splitlines()[0]
        raise Failed(f"the other launchers were lost: {reason}", where=config.rdzv_endpoint, fix=fix) from None


def _as_ours(error: Exception) -> Exception:
    """The exit code that says most about a failed gang: refused, else whatever came first."""
    failures = getattr(error, "failures", {})
    codes = {failure.exitcode for failure in failures.values()}
    if REFUSED in codes:
        sys.exit(REFUSED)  # a rank has told why
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    how = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    fix = "See its log above; the next start goes on from the newest checkpoint."
    return Failed(f"rank {rank} {how}, and no restart is left", where="trainer.launch", fix=fix)


if __name__ == "__main__":
    run_program(main)
