"""Which port of 127.0.0.1 each container port of each pod has, and what a Service's name means here."""

import secrets
import socket

from infra.local.objects import Json, ManifestError, Manifests, Workload, entries, name_of, namespace_of

LOOPBACK = "127.0.0.1"
# Below the ephemeral ranges of Linux (32768) and macOS (49152): no outgoing connection takes a port that an empty slot
# of a Deployment keeps for its next pod.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000


class AddressBook:
    """Ports by (workload, slot), the same for as long as the supervisor lives; a slot is an ordinal or an index."""

    def __init__(self) -> None:
        self._manifests = Manifests(())
        self._ports: dict[tuple[str, int], dict[int, int]] = {}
        self.published: dict[str, dict[int, int]] = {}  # workload → container port → port of a LoadBalancer

    def update(self, manifests: Manifests) -> None:
        """Take over the Services and workloads of `manifests`, keeping the ports of the slots that there are."""
        self._manifests = manifests
        self.published = {}
        for service in manifests.services:
            if service["spec"].get("type") != "LoadBalancer":
                continue
            for workload in manifests.behind(service)[:1]:
                for port in entries(service["spec"], "ports"):
                    number = workload.port_number(port.get("targetPort", port["port"]))
                    if number is not None:
                        self.published.setdefault(workload.key, {})[number] = port["port"]
        # A slot whose published port has changed gets its ports anew.
        for (key, slot), ports in list(self._ports.items()):
            wanted = self.published.get(key, {}) if slot == 0 else {}
            if wanted != {number: ports[number] for number in wanted if number in ports}:
                del self._ports[key, slot]

    def ports(self, workload: Workload, slot: int) -> dict[int, int]:
        """Container port → port of 127.0.0.1. Slot 0 of what a LoadBalancer selects has the Service's own port."""
        ports = self._ports.setdefault((workload.key, slot), {})
        published = self.published.get(workload.key, {}) if slot == 0 else {}
        for number in workload.container_ports:
            if number not in ports:
                ports[number] = published.get(number) or self._free_port()
        return {number: ports[number] for number in workload.container_ports}

    def resolve(self, host: str, port: int, *, namespace: str) -> str | None:
        """`127.0.0.1:port` for the name of a Service, or of a pod of a headless one; None for any other name."""
        found = self.endpoints(host, port, namespace=namespace)
        if not found:
            return None
        workload, number, slot = found[0]
        return f"{LOOPBACK}:{self.ports(workload, slot or 0)[number]}"

    def endpoints(self, host: str, port: int, *, namespace: str) -> list[tuple[Workload, int, int | None]]:
        """(workload, container port, slot or None for every slot) behind a DNS name; [] where it names no Service."""
        service, pod = self._service_called(host, namespace)
        if service is None:
            return []
        found: list[tuple[Workload, int, int | None]] = []
        for workload in self._manifests.behind(service):
            number = _container_port(service, port, workload)
            slot = next((s for s in range(workload.count) if workload.pod_name(s) == pod), None)
            if number is not None and (pod is None or slot is not None):
                found.append((workload, number, slot))
        return found

    def _service_called(self, host: str, namespace: str) -> tuple[Json | None, str | None]:
        """The Service that `[pod.]svc[.namespace[.svc[.cluster.local]]]` names, and the pod."""
        name = host.removesuffix(".").removesuffix(".cluster.local").removesuffix(".svc")
        match name.split("."):
            case [service]:
                readings = [(service, namespace, None)]
            case [first, second]:
                readings = [(first, second, None), (second, namespace, first)]
            case [pod, service, other]:
                readings = [(service, other, pod)]
            case _:
                readings = []
        for service, where, pod in readings:
            for found in self._manifests.services:
                if (name_of(found), namespace_of(found)) == (service, where):
                    return found, pod
        return None, None

    def _free_port(self) -> int:
        taken = {port for ports in self._ports.values() for port in ports.values()}
        taken |= {port for ports in self.published.values() for port in ports.values()}
        for _ in range(1000):
            port = _FIRST_PORT + secrets.randbelow(_LAST_PORT - _FIRST_PORT)
            if port not in taken and why_not_free(port) is None:
                return port
        raise ManifestError(f"no free port (127.0.0.1:{_FIRST_PORT}-{_LAST_PORT}). Stop what holds them")


def _container_port(service: Json, port: int, workload: Workload) -> int | None:
    """A Service's port means its targetPort; a headless Service's name is a pod's address, where any port is the pod's."""
    for declared in entries(service["spec"], "ports"):
        if declared["port"] == port:
            number = workload.port_number(declared.get("targetPort", port))
            if number is not None:
                return number
    return workload.port_number(port) if service["spec"].get("clusterIP") == "None" else None


def why_not_free(port: int) -> str | None:
    """Why nothing can listen on 127.0.0.1:`port` now, in words; None when it can."""
    with socket.socket() as probe:
        # As servers do: a connection of the last owner that lingers in TIME_WAIT does not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            return f"port {port} needs root"
        except OSError:
            return f"port {port} of {LOOPBACK} is in use"
    return None
