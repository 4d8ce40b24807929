"""What each process of the node is started with: its flags and its configuration file, as kubeadm would have them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.clouds.local.debian import Debian
from infra.clouds.local.golang import Built
from infra.clouds.local.places import API_PORT, DNS_IP, KUBERNETES, NODE, NODE_IP, PODS, SERVICES, Places

Json = dict[str, Any]
CGROUP = "slipway"
"""Cgroup that all pods are in, so that `down` finds what a kill left."""
PAUSE = "localhost/slipway-node:1"
"""Image of a pod's sandbox."""
SOCKET = "/run/containerd/containerd.sock"
ETCD = "http://127.0.0.1:2379"


@dataclass(frozen=True, kw_only=True)
class Process:
    name: str
    command: tuple[str, ...]


def kubeadm(places: Places) -> list[Json]:
    """What kubeadm makes keys and kubeconfigs from."""
    version = "kubeadm.k8s.io/v1beta4"
    return [
        {
            "apiVersion": version,
            "kind": "InitConfiguration",
            "localAPIEndpoint": {"advertiseAddress": NODE_IP, "bindPort": API_PORT},
            "nodeRegistration": {"name": NODE, "criSocket": f"unix://{SOCKET}"},
        },
        {
            "apiVersion": version,
            "kind": "ClusterConfiguration",
            "kubernetesVersion": KUBERNETES,
            "certificatesDir": str(places.keys),
            "encryptionAlgorithm": "ECDSA-P256",
            "networking": {"podSubnet": PODS, "serviceSubnet": SERVICES},
        },
    ]


def write(places: Places, debian: Debian, *, may_raise_oom_score: bool) -> None:
    """Write the configuration files of the node's processes."""
    places.settings.mkdir(parents=True, exist_ok=True)
    (places.settings / "containerd.toml").write_text(_containerd(places, debian, may_raise_oom_score))
    # The node reaches no name server: a name that is not the cluster's does not exist.
    (places.settings / "resolv.conf").write_text("")
    _cni(places.settings / "cni")
    for name, document in (("kubelet", _kubelet(places)), ("kube-proxy", _kube_proxy(places))):
        (places.settings / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def processes(places: Places, built: Built, *, python: str) -> tuple[Process, ...]:
    """The node's processes, in the order of their start."""
    keys = places.keys
    of = {"as_scheduler": keys / "scheduler.conf", "as_controllers": keys / "controller-manager.conf"}
    controllers = [
        *("--allocate-node-cidrs=true", f"--cluster-cidr={PODS}", "--node-cidr-mask-size=24"),
        f"--service-cluster-ip-range={SERVICES}",
        *(f"--cluster-signing-cert-file={keys}/ca.crt", f"--cluster-signing-key-file={keys}/ca.key"),
        *(f"--root-ca-file={keys}/ca.crt", f"--service-account-private-key-file={keys}/sa.key"),
        "--use-service-account-credentials=true",
        # A node that is gone is told in seconds, where clouds take most of a minute.
        *("--node-monitor-period=2s", "--node-monitor-grace-period=16s"),
        *_as(of["as_controllers"]),
    ]
    kubelet = [f"--config={places.settings}/kubelet.yaml", f"--kubeconfig={keys}/kubelet.conf", f"--node-ip={NODE_IP}"]
    kubelet.append(f"--hostname-override={NODE}")

    def kube(name: str, flags: Sequence[str]) -> Process:
        return Process(name=name, command=(str(built.program(name)), *flags))

    etcd = ("etcd", "--data-dir=/var/lib/etcd", f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}")
    return (
        Process(name="etcd", command=(*etcd, "--listen-peer-urls=http://127.0.0.1:2380", "--log-level=warn")),
        Process(name="containerd", command=("containerd", "--config", f"{places.settings}/containerd.toml")),
        kube("kube-apiserver", _apiserver(places)),
        kube("kube-controller-manager", controllers),
        kube("kube-scheduler", ["--leader-elect=false", *_as(of["as_scheduler"])]),
        kube("kubelet", kubelet),
        kube("kube-proxy", [f"--config={places.settings}/kube-proxy.yaml", f"--hostname-override={NODE}"]),
        Process(name="agent", command=(python, "-m", "infra.clouds.local.agent", f"{keys}/super-admin.conf")),
    )


def _apiserver(places: Places) -> list[str]:
    keys = places.keys
    return [
        *(f"--advertise-address={NODE_IP}", f"--secure-port={API_PORT}", f"--etcd-servers={ETCD}"),
        *(f"--service-cluster-ip-range={SERVICES}", "--authorization-mode=Node,RBAC", "--allow-privileged=true"),
        "--enable-admission-plugins=NodeRestriction",
        *(f"--client-ca-file={keys}/ca.crt", f"--tls-cert-file={keys}/apiserver.crt"),
        f"--tls-private-key-file={keys}/apiserver.key",
        f"--kubelet-client-certificate={keys}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={keys}/apiserver-kubelet-client.key",
        # The node's name is known to nobody's name server.
        "--kubelet-preferred-address-types=InternalIP",
        f"--proxy-client-cert-file={keys}/front-proxy-client.crt",
        f"--proxy-client-key-file={keys}/front-proxy-client.key",
        f"--requestheader-client-ca-file={keys}/front-proxy-ca.crt",
        *("--requestheader-allowed-names=front-proxy-client", "--requestheader-username-headers=X-Remote-User"),
        *("--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-"),
        *(f"--service-account-key-file={keys}/sa.pub", f"--service-account-signing-key-file={keys}/sa.key"),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        # Aggregated APIs are pods, and the API server is a process of the node, which serves ClusterIPs as well.
        "--enable-aggregator-routing=true",
    ]


def _as(kubeconfig: Path) -> list[str]:
    flags = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return [*(f"--{flag}={kubeconfig}" for flag in flags), "--bind-address=127.0.0.1"]


def _kubelet(places: Places) -> Json:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(places.keys / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": str(places.settings / "resolv.conf"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}",
        # Laptops swap, and machines without systemd may still have cgroup v1.
        "failSwapOn": False,
        "failCgroupV1": False,
        # The disk is the user's: a full one is told by what fails, and no image is thrown away that cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "4s",
    }


def _kube_proxy(places: Places) -> Json:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(places.keys / "super-admin.conf")},
        "clusterCIDR": PODS,
        "mode": "nftables",
        # These are settings of the machine, and not of the node.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def _cni(folder: Path) -> None:
    """Each pod on a link of its own, so that all traffic between pods is routed, and meets the network policies."""
    folder.mkdir(exist_ok=True)
    ipam = {
        "type": "host-local",
        "dataDir": "/run/cni-ipam",
        "ranges": [[{"subnet": PODS.replace("/18", "/24")}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugins = [{"type": "ptp", "ipMasq": False, "ipam": ipam}]
    network = {"cniVersion": "0.4.0", "name": "slipway", "plugins": plugins}
    (folder / "10-slipway.conflist").write_text(json.dumps(network, indent=1))


def _containerd(places: Places, debian: Debian, may_raise_oom_score: bool) -> str:
    plugins = debian.file("lib/cni/ptp").parent
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # Where the machine withholds CAP_SYS_RESOURCE a sandbox that asks for a lower score dies at its start.
  restrict_oom_score_adj = {str(not may_raise_oom_score).lower()}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{places.settings}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""
