"""Where the cluster keeps what, its addresses, and how it says no."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NODE = "slipway"
"""Name of the node, and its host name."""
KUBERNETES = "v1.36.3"

# One /16 for everything, which the machine reaches by one route over one interface.
NETWORK = "10.77.0.0/16"
MACHINE_IP, NODE_IP, LINK_BITS = "10.77.0.1", "10.77.0.2", 30
PODS, SERVICES = "10.77.64.0/18", "10.77.128.0/17"
API_IP, DNS_IP = "10.77.128.1", "10.77.128.10"
API_PORT = 6443
INTERFACE = "slipway0"
"""The machine's end of the link to the node."""


class Unable(Exception):
    """This machine lacks something that the cluster needs: `WHAT (WHERE). FIX`."""


class ClusterError(Exception):
    """Something that should have worked did not."""


@dataclass(frozen=True, kw_only=True)
class Places:
    state: Path
    """Everything of the running cluster; gone after `down`."""
    cache: Path
    """What is worth keeping between clusters, in folders named by the digest of what they were made from."""

    @classmethod
    def of_user(cls) -> "Places":
        home = Path.home()
        state = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
        return cls(state=state / "slipway" / "cluster", cache=cache / "slipway")

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def keys(self) -> Path:
        """Certificates, keys and kubeconfigs of the components."""
        return self.state / "keys"

    @property
    def settings(self) -> Path:
        return self.state / "settings"

    @property
    def logs(self) -> Path:
        """One log a process, and the containers' under `pods/`."""
        return self.state / "log"

    @property
    def shared(self) -> Path:
        """`/run` of the node: containerd's socket and what else dies with it."""
        return self.state / "run"

    @property
    def library(self) -> Path:
        """`/var/lib` of the node: etcd, containerd, kubelet, volumes."""
        return self.state / "var-lib"


def digest_of(parts: Iterable[bytes]) -> str:
    """12 hex digits that name a folder of the cache."""
    sha = hashlib.sha256()
    for part in parts:
        # Length first, so that two parts never read as one.
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:12]
