"""From one pod of a workload to what is run: arguments, environment, files and ports. Nothing is started or written."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from infra.local import envoy, rewrite
from infra.local.addresses import LOOPBACK, AddressBook
from infra.local.objects import Json, ManifestError, Manifests, Workload, entries, quantity, section
from infra.local.secrets import Secrets
from infra.local.sources import Sources

# What of the caller's environment a process sees: no secrets by accident.
_PASSED_ON = ("PATH", "LANG", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Probe:
    """A probe with its port and command as they are here; Kubernetes' defaults."""

    kind: str  # http, tcp, exec
    port: int = 0
    path: str = "/"
    scheme: str = "http"
    headers: dict[str, str] = field(default_factory=dict[str, str])
    argv: list[str] = field(default_factory=list[str])
    initial_delay_s: float = 0
    period_s: float = 10
    timeout_s: float = 1
    success_threshold: int = 1
    failure_threshold: int = 3


@dataclass(frozen=True)
class ContainerPlan:
    name: str
    argv: list[str]
    env: dict[str, str]
    cwd: Path
    startup: Probe | None
    readiness: Probe | None
    liveness: Probe | None
    pre_stop_s: float
    pre_stop: list[str]


@dataclass(frozen=True)
class PodPlan:
    name: str
    workload: str  # Kind/name
    slot: int
    directory: Path
    init: list[ContainerPlan]
    containers: list[ContainerPlan]
    directories: list[Path]
    files: dict[Path, str]
    links: dict[Path, Path]
    endpoint_files: list[envoy.EndpointFile]
    namespace: str
    restart_policy: str
    grace_s: float
    ports: dict[str, int]


class Planner:
    """Plans pods of one set of manifests. Raises ManifestError for what cannot run on one machine."""

    def __init__(
        self, *, manifests: Manifests, book: AddressBook, state_dir: Path, secrets: Secrets | None = None
    ) -> None:
        """`secrets` are the user's own, for what the manifests name and do not hold."""
        self.manifests = manifests
        self.book = book
        self.state_dir = state_dir
        self.secrets = secrets

    def pod(self, workload: Workload, slot: int) -> PodPlan:
        return _Pod(self, workload, slot).plan()


class _Pod:
    """One pod being planned: its volumes and ports, which its containers share."""

    def __init__(self, planner: Planner, workload: Workload, slot: int) -> None:
        self.manifests, self.book, self.workload, self.slot = planner.manifests, planner.book, workload, slot
        self.state_dir = planner.state_dir
        self.sources = Sources(planner.manifests, planner.secrets, workload)
        self.name = workload.pod_name(slot)
        self.directory = planner.state_dir / "pods" / self.name
        self.ports = self.book.ports(workload, slot)
        self.directories: list[Path] = [self.directory, self.directory / "tmp"]
        self.files: dict[Path, str] = {}
        self.links: dict[Path, Path] = {}
        self.endpoint_files: list[envoy.EndpointFile] = []
        self.volumes = {v["name"]: self._volume(v) for v in entries(workload.pod_spec, "volumes")}

    def plan(self) -> PodPlan:
        spec, workload = self.workload.pod_spec, self.workload
        init = [self._container(c) for c in entries(spec, "initContainers")]
        containers = [self._container(c) for c in spec["containers"]]
        for mounts in map(self._mounts, workload.containers):
            for path in [p for p in self.files if any(p.is_relative_to(m) for m in mounts.values())]:
                self._rewrite_envoy(path, mounts)
        return PodPlan(
            name=self.name,
            workload=workload.key,
            slot=self.slot,
            directory=self.directory,
            init=init,
            containers=containers,
            directories=self.directories,
            files=self.files,
            links=self.links,
            endpoint_files=self.endpoint_files,
            namespace=workload.namespace,
            restart_policy=spec.get("restartPolicy", "Always"),
            grace_s=spec.get("terminationGracePeriodSeconds", 30),
            ports={workload.container_ports[n] or str(n): port for n, port in self.ports.items()},
        )

    # Containers

    def _container(self, container: Json) -> ContainerPlan:
        if not container.get("command"):
            raise self._error(container, "no command, and the image is ignored on one machine", "Write the command")
        if container.get("restartPolicy"):
            raise self._error(container, "a sidecar among the init containers", "Make it one of the containers")
        mounts = self._mounts(container)
        declared = self._declared_env(container)
        words: list[str] = [*container["command"], *(container.get("args") or list[str]())]
        argv = [self._text(rewrite.expand(word, declared), mounts) for word in words]
        argv = [rewrite.program(argv[0]), *argv[1:]]
        if Path(container["command"][0]).name == "envoy":
            argv = envoy.arguments(argv)
        # What is published has one port: no other pod takes over while it would wait, so it does not.
        hook = {} if self.workload.key in self.book.published else section(container, "lifecycle", "preStop")
        return ContainerPlan(
            name=container["name"],
            argv=argv,
            env=self._environment(declared, mounts),
            cwd=mounts.get(container.get("workingDir", "").rstrip("/"), self.directory),
            startup=self._probe(container, "startupProbe", mounts),
            readiness=self._probe(container, "readinessProbe", mounts),
            liveness=self._probe(container, "livenessProbe", mounts),
            pre_stop_s=section(hook, "sleep").get("seconds", 0),
            pre_stop=self._command(hook, mounts),
        )

    def _command(self, handler: Json, mounts: Mapping[str, Path]) -> list[str]:
        """The command of an exec probe or hook; [] where it is of another kind. Kubernetes expands nothing here."""
        words = [self._text(word, mounts) for word in section(handler, "exec").get("command", list[str]())]
        return [rewrite.program(words[0]), *words[1:]] if words else []

    def _text(self, text: str, mounts: Mapping[str, Path]) -> str:
        """Rules 2 and 4 on one word."""
        namespace = self.workload.namespace
        resolved = rewrite.hosts(text, lambda host, port: self.book.resolve(host, port, namespace=namespace))
        return rewrite.paths(resolved, mounts)

    def _environment(self, declared: Mapping[str, str], mounts: Mapping[str, Path]) -> dict[str, str]:
        env = {k: os.environ[k] for k in _PASSED_ON if k in os.environ}
        env |= {k: v for k, v in os.environ.items() if k.lower() in _PROXIES}
        env |= {k: f"{os.environ[k]},{LOOPBACK},localhost" for k in ("no_proxy", "NO_PROXY") if k in os.environ}
        env |= {"HOME": str(self.directory), "TMPDIR": str(mounts.get("/tmp", self.directory / "tmp"))}  # noqa: S108
        env |= {"LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HOSTNAME": self.name}
        env |= {name: self._text(value, mounts) for name, value in declared.items()}
        path = [str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])]
        return env | {"PYTHONPATH": os.pathsep.join(path), "SLIPWAY_LOCAL": str(self.state_dir)}

    def _declared_env(self, container: Json) -> dict[str, str]:
        """The manifest's own environment, in order and expanded; the ports of this machine win over written ones."""
        own: dict[str, str] = {}
        names: list[tuple[int, str | None]] = [(p["containerPort"], p.get("name")) for p in entries(container, "ports")]
        fixed = {rewrite.port_variable(name): str(self.ports[number]) for number, name in names if name}
        if self.workload.indexed:
            fixed["JOB_COMPLETION_INDEX"] = str(self.slot)
        own |= fixed
        for source in entries(container, "envFrom"):
            for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                if key in source:
                    own |= {source.get("prefix", "") + k: v for k, v in self.sources.data(kind, source[key]).items()}
        for variable in entries(container, "env"):
            name: str = variable["name"]
            if name in fixed:
                continue
            value = self._value_from(container, variable) if "valueFrom" in variable else variable.get("value", "")
            if value is not None:
                own[name] = value if "valueFrom" in variable else rewrite.expand(str(value), own)
        return own | fixed

    def _value_from(self, container: Json, variable: Json) -> str | None:
        source: Json = variable["valueFrom"]
        for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
            if key in source:
                return self.sources.key(kind, source[key])
        if "fieldRef" in source:
            return self._field(container, source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            return self._resource(container, source["resourceFieldRef"])
        raise self._error(container, f"{variable['name']} has an unknown valueFrom", "Use a field, resource or key")

    def _field(self, container: Json, path: str) -> str:
        annotations: dict[str, str] = dict(section(self.workload.template, "metadata", "annotations"))
        index = {"batch.kubernetes.io/job-completion-index": str(self.slot)} if self.workload.indexed else {}
        for prefix, values in (
            ("metadata.labels", self.workload.labels | index),
            ("metadata.annotations", annotations | index),
        ):
            if path.startswith(prefix + "['"):
                return values.get(path.removeprefix(prefix + "['").removesuffix("']"), "")
        fields = {
            "metadata.name": self.name,
            "metadata.namespace": self.workload.namespace,
            "metadata.uid": self.name,
            "spec.nodeName": "localhost",
            "spec.serviceAccountName": self.workload.pod_spec.get("serviceAccountName", "default"),
            "status.podIP": LOOPBACK,
            "status.podIPs": LOOPBACK,
            "status.hostIP": LOOPBACK,
        }
        if path not in fields:
            raise self._error(container, f"unknown field {path}", f"Use one of {', '.join(sorted(fields))}")
        return fields[path]

    def _resource(self, container: Json, reference: Json) -> str:
        """Limits and requests in units of the divisor, rounded up; without a limit, the machine's capacity."""
        kind, _, resource = reference["resource"].partition(".")
        capacity = {"cpu": os.cpu_count() or 1, "memory": psutil.virtual_memory().total}
        written = section(container, "resources", kind).get(resource, capacity.get(resource, 0))
        # A divisor of "0" is what the API server writes for an absent one.
        divisor = quantity(reference.get("divisor") or 1) or 1
        return str(math.ceil(quantity(written) / divisor))

    def _probe(self, container: Json, key: str, mounts: Mapping[str, Path]) -> Probe | None:
        probe = section(container, key)
        if not probe:
            return None
        http = section(probe, "httpGet")
        kind, port = "http" if http else "tcp" if "tcpSocket" in probe else "exec", 0
        if "exec" not in probe:
            target = (http or section(probe, "tcpSocket")).get("port")
            if target is None:
                raise self._error(container, f"{key} is no httpGet, tcpSocket or exec", "Use one of these")
            number = self.workload.port_number(target)
            if number is None:
                raise self._error(container, f"{key} asks port {target}, which no container has", "Declare the port")
            port = self.ports[number]
        return Probe(
            kind=kind,
            port=port,
            path=http.get("path", "/"),
            scheme=http.get("scheme", "HTTP").lower(),
            headers={h["name"]: h["value"] for h in entries(http, "httpHeaders")},
            argv=self._command(probe, mounts),
            initial_delay_s=probe.get("initialDelaySeconds", 0),
            period_s=probe.get("periodSeconds", 10),
            timeout_s=probe.get("timeoutSeconds", 1),
            success_threshold=probe.get("successThreshold", 1),
            failure_threshold=probe.get("failureThreshold", 3),
        )

    # Volumes

    def _mounts(self, container: Json) -> dict[str, Path]:
        """mountPath → directory or file, for one container."""
        mounts: dict[str, Path] = {}
        for mount in entries(container, "volumeMounts"):
            if mount["name"] not in self.volumes:
                raise self._error(container, f"no volume {mount['name']!r}", "Declare it in the pod's volumes")
            mounts[mount["mountPath"].rstrip("/")] = self.volumes[mount["name"]] / mount.get("subPath", "")
        return mounts

    def _volume(self, volume: Json) -> Path:
        """The directory of one volume; its directories and files are noted for the pod's start."""
        name: str = volume["name"]
        own = self.directory / "volumes" / name
        if "persistentVolumeClaim" in volume:
            own = self.state_dir / "volumes" / volume["persistentVolumeClaim"]["claimName"]
        elif "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        elif "emptyDir" not in volume:
            for source in entries(section(volume, "projected"), "sources") or [volume]:
                self._project(name, source, own)
        self.directories.append(own)
        return own

    def _project(self, volume: str, source: Json, directory: Path) -> None:
        """Files of a ConfigMap or a Secret."""
        if "configMap" in source:
            kind, reference = "ConfigMap", source["configMap"]
        elif "secret" in source:
            kind, reference = "Secret", {"name": source["secret"].get("secretName"), **source["secret"]}
        else:
            raise ManifestError(
                f"volume {volume!r} is of a kind that one machine does not have ({self.workload.key}). "
                "Use a claim, emptyDir, ConfigMap, Secret or hostPath"
            )
        for path, content in self.sources.files(kind, reference).items():
            if isinstance(content, Path):
                self.links[directory / path] = content
            else:
                self.files[directory / path] = content

    def _rewrite_envoy(self, path: Path, mounts: Mapping[str, Path]) -> None:
        """Replace a file that is an Envoy bootstrap by its form for this machine, once."""
        config = envoy.parse(self.files[path])
        directory = self.directory / "endpoints" / path.stem
        if config is None or directory in self.directories:
            return
        namespace = self.workload.namespace
        rewritten, files = envoy.rewrite(
            config,
            names_service=lambda host, port: bool(self.book.endpoints(host, port, namespace=namespace)),
            own_ports=self.ports,
            rewrite_text=lambda value: rewrite.paths(value, mounts),
            directory=directory,
        )
        self.files[path] = yaml.safe_dump(rewritten, sort_keys=False)
        self.endpoint_files += files
        self.directories.append(directory)

    def _error(self, container: Json, what: str, fix: str) -> ManifestError:
        return ManifestError(f"{what} (container {container['name']} of {self.workload.key}). {fix}")
