"""`python -m serving.pull CHANNEL LINK`: waits until a registry channel has a model, copies it here and verifies it.

LINK then points at its directory: how runtimes that do not know the registry find a model. What is copied already is not
copied again (`XDG_CACHE_HOME`). Exit 0 once LINK is there, 2 for a channel or package that cannot be used.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from serving import logs
from serving.errors import Refused
from serving.package import Package, fetch, resolve

POLL_S = 2.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.pull", description="Copies a model here, once there is one."
    )
    parser.add_argument("model", metavar="CHANNEL", help="…/channels/<channel>.json, or a registry entry")
    parser.add_argument("link", type=Path, metavar="LINK", help="symbolic link to make to the model's directory")
    asked = parser.parse_args(argv)
    try:
        package = await_package(asked.model)
        _point(asked.link, fetch(package, on_bytes=logs.Progress("load", unit="bytes checked").update))
    except Refused as error:
        return logs.end(error, code=2)
    except OSError as error:
        return logs.end(error, code=1)
    logs.event("artifact", kind="model", path=str(asked.link), digest=package.digest)
    return 0


def await_package(model: str) -> Package:
    """The package that `model` names, once it names one. Raises `Refused`."""
    source = resolve(model)
    if isinstance(source, Package):
        return source
    said = False
    while (package := source.read()) is None:
        if not said:
            logs.event("waiting", message=f"there is no model in the channel yet ({source.url})")
            said = True
        time.sleep(POLL_S)
    return package


def _point(link: Path, root: Path) -> None:
    """The link appears, or changes what it points at, at once."""
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(root)
    beside.replace(link)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
