"""A pod's port on this machine, as `kubectl port-forward` gives it: past network policies, by the caller's own rights."""

import contextlib
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from infra.apply import Cluster

CHUNK = 1 << 16


@contextmanager
def forwarded(cluster: Cluster, *, namespace: str, pod: str, port: int) -> Generator[str]:
    """`http://127.0.0.1:PORT`, whose connections end at the pod's port for as long as the context is open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=_accept, args=(server, cluster, namespace, pod, port), daemon=True)
        accepting.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone does not
            accepting.join()


def _accept(server: socket.socket, cluster: Cluster, namespace: str, pod: str, port: int) -> None:
    while True:
        try:
            caller, _ = server.accept()
        except OSError:
            return
        relay = threading.Thread(target=_relay, args=(caller, cluster, namespace, pod, port), daemon=True)
        relay.start()


def _relay(caller: socket.socket, cluster: Cluster, namespace: str, pod: str, port: int) -> None:
    """One connection. Where the pod does not answer, the caller's is closed, which is what a refused port looks like."""
    with caller:
        try:
            remote = _connect(cluster, namespace, pod, port)
        except Exception:  # the library raises whatever its websocket does
            return
        back = threading.Thread(target=_copy, args=(remote, caller), daemon=True)
        back.start()
        _copy(caller, remote)
        back.join()
        remote.close()


def _connect(cluster: Cluster, namespace: str, pod: str, port: int) -> socket.socket:
    from kubernetes import client
    from kubernetes.stream import portforward  # pyright: ignore[reportUnknownVariableType]

    # A client of its own: the library exchanges a method of the one that it is given.
    api: Any = cast(Any, client).CoreV1Api(cast(Any, client).ApiClient(cluster.api.configuration))
    method = api.connect_get_namespaced_pod_portforward
    return cast(Any, portforward)(method, pod, namespace, ports=str(port)).socket(port)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Until `source` has no more; then `sink` is told so."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
