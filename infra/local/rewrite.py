"""What a cluster does by network and mount namespaces, done by rewriting text: `docs/contracts.md`, "One machine".

Pure functions of strings. Everything here is applied to `command`, `args` and `env`, and to Envoy configurations.
"""

import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

# `$(NAME)` and its escape `$$`, as kubernetes/third_party/forked/golang/expansion reads them.
_REFERENCE = re.compile(r"\$(?:(\$)|\(([^)]*)\))")
# A DNS name and a port, not in the middle of a word: `serve.team.svc:80`, `http://train-0.train:29400/x`.
_HOST_PORT = re.compile(
    r"(?<![\w.-])([a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*):(\d+)(?!\d)"
)
_ANY_ADDRESS = re.compile(r"(?<![\d.])0\.0\.0\.0(?![\d.])")
# Where a path can start within a word: at its beginning, after `key=`, in a list, in quotes, or in a file URL.
_BEFORE_PATH = r"(?:^|(?<=[=:,;\s'\"(\[{|<>])|(?<=\bfile://))"
_AFTER_PATH = r"(?![^/:,;\s'\")\]}|<>])"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Expand `$(NAME)` by Kubernetes' rules: `$$` is an escaped `$`, and an unknown reference is left as it stands."""

    def value(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        return "$" if escaped else variables.get(name, match[0])

    return _REFERENCE.sub(value, text)


def paths(text: str, mounts: Mapping[str, Path]) -> str:
    """Replace each mountPath that starts a path (`/data/x`, `run=/data`, `file:///data`) with its directory."""
    if not mounts:
        return text
    # Longest first, in one pass: `/data/cache` is not taken for `/data`, and a replacement is never replaced again.
    either = "|".join(re.escape(mount) for mount in sorted(mounts, key=len, reverse=True))
    return re.sub(f"{_BEFORE_PATH}({either}){_AFTER_PATH}", lambda match: str(mounts[match[1]]), text)


def hosts(text: str, resolve: Callable[[str, int], str | None]) -> str:
    """Replace each `host:port` that `resolve` knows with the `address:port` that it returns, and 0.0.0.0 with loopback."""
    known = _HOST_PORT.sub(lambda match: resolve(match[1], int(match[2])) or match[0], text)
    return _ANY_ADDRESS.sub("127.0.0.1", known)


def program(name: str) -> str:
    """`python` is the interpreter that runs this, `envoy` the one installed beside it; the rest comes from PATH."""
    if name in ("python", "python3"):
        return sys.executable
    if name == "envoy":
        return shutil.which("envoy", path=sysconfig.get_path("scripts")) or name
    return name


def port_variable(port_name: str) -> str:
    """The variable that carries the number of a named container port: `http` → `HTTP_PORT`."""
    return port_name.upper().replace("-", "_") + "_PORT"
