"""A real Kubernetes of one node on this machine, without Docker and without pulling an image.

The whole cluster lives in namespaces of its own (processes, mounts, network, host name), and its files under two folders:

    folder                              what                                           removed by
    ~/.local/state/slipway/cluster      etcd, containerd, volumes, keys, logs          `slipway cluster down`
    ~/.cache/slipway                    Kubernetes as built, Debian's programs         the user, like any cache

so that to end one process is to end all of them, with every mount, network interface and nft rule that they made, in
whatever state they were. Reading order: `places`, `debian`, `golang` (what runs), `settings` (how), `node` (inside the
namespaces), `machine` (outside), `addons` and
`options` (what is in it), `cluster` (up, down, status).
"""

from infra.clouds.local.cluster import Status, down, images, load_image, status, up
from infra.clouds.local.options import AddOn
from infra.clouds.local.places import ClusterError, Places, Unable

__all__ = ["AddOn", "ClusterError", "Places", "Status", "Unable", "down", "images", "load_image", "status", "up"]
