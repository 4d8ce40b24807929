"""The container that answers for a service: the row of its runtime, filled in with what the service says."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil

import pulumi
from pulumi_kubernetes.core import v1 as core

from infra.components.common import env, resources, threads_from_limit
from infra.components.model_registry import RegistryAccess
from infra.components.pods import Claim, container
from infra.spec import PodResources, Runtime, Service
from infra.spec.runtimes import placeholders
from infra.spec.serving import LINGER_S, PRE_STOP_S, Adapter

ADMIN_PORT = 9000
KEYS_MOUNT, MODELS_MOUNT, FILES_MOUNT, CACHE_MOUNT, BATCHES_MOUNT = "/keys", "/models", "/runtime", "/cache", "/files"
KEYS_FILE = "keys.json"
STORE_VARIABLES = {"session": "SESSION_STORE_URL", "prefix": "KV_SPILL_URL"}
PACKAGE = f"{MODELS_MOUNT}/package"
# Importing torch and starting CUDA before the port is open, with room for a cold disk.
START_S = 60
# Copying a model is waiting for the network.
COPY = PodResources(cpus=0.5, memory_gib=1)


Values = Mapping[str, str | int | tuple[str, ...] | None]


@dataclass(frozen=True, kw_only=True)
class Server:
    """One replica's containers, ports and volumes."""

    service: Service
    runtime: Runtime
    image: pulumi.Input[str]
    """Of the stack's own server; another runtime brings its own."""
    registry: RegistryAccess
    gpu_resource: str
    load_s: int
    """Estimated time to load the model, seconds."""
    kv_tokens: int | None
    """Tokens that `kv_gib` holds; None when the stack does not say the model's shape."""
    files: str | None
    """ConfigMap of the runtime's files, where it has some."""
    collector_url: str | None
    """Where Slipway's own server sends its spans; None: nowhere."""

    @property
    def ports(self) -> dict[str, int]:
        return ports(self.service, self.runtime)

    @property
    def init_containers(self) -> list[core.ContainerArgs]:
        """A runtime that does not know the registry finds the model copied, once the channel has one."""
        if self.runtime.follows_channel:
            return []
        copy = container(
            name="model",
            image=self.image,
            command=["python", "-m", "serving.pull", self._channel, PACKAGE],
            resources=resources(COPY, gpu_resource=self.gpu_resource),
            mounts=self._mounts,
            variables=env(XDG_CACHE_HOME=self._cache_dir),
        )
        return [copy]

    @property
    def container(self) -> core.ContainerArgs:
        # The port of the own server opens before the model is there, and `live` says so: what waits is not killed.
        live = self._probe(self.runtime.live)
        budget_s = START_S + 2 * self.load_s
        stays_s = PRE_STOP_S if self.runtime.drains else PRE_STOP_S + self.service.drain_s
        return container(
            name="server",
            image=self.runtime.image or self.image,
            command=command(self.runtime, self._values()),
            resources=resources(self.service.resources, gpus=self.service.gpus, gpu_resource=self.gpu_resource),
            mounts=self._mounts,
            ports=self.ports,
            variables=[threads_from_limit(), *self._variables()],
            lifecycle=core.LifecycleArgs(
                pre_stop=core.LifecycleHandlerArgs(sleep=core.SleepActionArgs(seconds=stays_s))
            ),
            startup=core.ProbeArgs(
                http_get=live, period_seconds=2, timeout_seconds=2, failure_threshold=ceil(budget_s / 2)
            ),
            readiness=core.ProbeArgs(
                http_get=self._probe(ready_path(self.service, self.runtime)),
                period_seconds=2,
                timeout_seconds=2,
                failure_threshold=2,
            ),
            # A minute without an answer: the process is stuck, and not merely busy.
            liveness=core.ProbeArgs(http_get=live, period_seconds=10, timeout_seconds=5, failure_threshold=6),
        )

    @property
    def volumes(self) -> list[core.VolumeArgs]:
        volumes = list({claim.claim: claim.volume for claim in self._claims}.values())
        if not self.runtime.follows_channel:
            volumes.append(core.VolumeArgs(name="models", empty_dir=core.EmptyDirVolumeSourceArgs()))
        if self.files:
            source = core.ConfigMapVolumeSourceArgs(name=self.files)
            volumes.append(core.VolumeArgs(name="runtime", config_map=source))
        if self.service.api_keys_secret:
            secret = core.SecretVolumeSourceArgs(secret_name=self.service.api_keys_secret)
            volumes.append(core.VolumeArgs(name="keys", secret=secret))
        if self.service.cache_gib:
            claim = core.PersistentVolumeClaimVolumeSourceArgs(claim_name=cache_claim(self.service))
            volumes.append(core.VolumeArgs(name="cache", persistent_volume_claim=claim))
        if self.service.gpus > 1:
            # Ranks of one replica meet in shared memory, of which a container has 64 MiB by default.
            memory = core.EmptyDirVolumeSourceArgs(medium="Memory")
            volumes.append(core.VolumeArgs(name="shared-memory", empty_dir=memory))
        return volumes

    @property
    def _mounts(self) -> list[core.VolumeMountArgs]:
        mounts = [claim.mount for claim in self._claims]
        if not self.runtime.follows_channel:
            mounts.append(core.VolumeMountArgs(name="models", mount_path=MODELS_MOUNT))
        if self.files:
            mounts.append(core.VolumeMountArgs(name="runtime", mount_path=FILES_MOUNT, read_only=True))
        if self.service.api_keys_secret:
            mounts.append(core.VolumeMountArgs(name="keys", mount_path=KEYS_MOUNT, read_only=True))
        if self.service.cache_gib:
            mounts.append(core.VolumeMountArgs(name="cache", mount_path=CACHE_MOUNT))
        if self.service.gpus > 1:
            mounts.append(core.VolumeMountArgs(name="shared-memory", mount_path="/dev/shm"))  # noqa: S108
        return mounts

    @property
    def _claims(self) -> list[Claim]:
        """The registry's volume, and that of files and batches, which may be the same."""
        files = self.service.files_claim
        return [*self.registry.claims, *([Claim(claim=files, mount_path=BATCHES_MOUNT)] if files else [])]

    @property
    def _channel(self) -> str:
        return self.registry.channel(self.service.model, self.service.channel)

    def _entry(self, adapter: Adapter) -> str:
        """URL of an adapter's channel, or of the one entry that it is."""
        if adapter.digest is None:
            return self.registry.channel(adapter.model, adapter.channel)
        return self.registry.entry(adapter.model, adapter.digest)

    @property
    def _cache_dir(self) -> str:
        return CACHE_MOUNT if self.service.cache_gib else MODELS_MOUNT

    def _variables(self) -> list[core.EnvVarArgs]:
        """The runtime's own, and where caches go that are to outlive the pod."""
        kept = {
            "XDG_CACHE_HOME": CACHE_MOUNT,
            "TORCHINDUCTOR_CACHE_DIR": f"{CACHE_MOUNT}/inductor",
            "TRITON_CACHE_DIR": f"{CACHE_MOUNT}/triton",
        }
        return [*env(**(kept if self.service.cache_gib else {}), **self.runtime.env), *self._stores(), *self._spans()]

    def _stores(self) -> list[core.EnvVarArgs]:
        """By variables, since a command line shows a URL's password to the whole node; by reference, since manifests are kept."""
        found: list[core.EnvVarArgs] = []
        for what, store in self.service.stores.items():
            key = core.SecretKeySelectorArgs(name=store.secret, key="url")
            source = core.EnvVarSourceArgs(secret_key_ref=key)
            found.append(core.EnvVarArgs(name=STORE_VARIABLES[what], value_from=source))
        return found

    def _spans(self) -> list[core.EnvVarArgs]:
        if self.collector_url is None or not self.runtime.is_own:
            return []
        return env(OTEL_EXPORTER_OTLP_ENDPOINT=self.collector_url, OTEL_SERVICE_NAME=self.service.name)

    def _values(self) -> Values:
        """What each placeholder stands for; None: the service does not say."""
        service = self.service
        kv_bytes = int(service.kv_gib * 2**30)
        keys = service.api_keys_secret is not None
        return {
            "model": self._channel if self.runtime.follows_channel else PACKAGE,
            "served_name": service.model,
            "port": "$(HTTP_PORT)",
            "metrics_port": "$(METRICS_PORT)",
            "gpus": service.gpus or None,
            "linger_s": LINGER_S,
            "drain_s": service.drain_s,
            "max_model_len": service.max_model_len,
            "max_num_seqs": service.max_num_seqs,
            "max_queued_tokens": service.max_queued_tokens,
            "kv_bytes": kv_bytes,
            "kv_bytes_per_gpu": kv_bytes // max(service.gpus, 1),
            "kv_tokens": self.kv_tokens,
            "dtype": service.dtype,
            "quantize": service.quantize,
            "speculate_tokens": service.speculate_tokens or None,
            "attention": service.attention if service.attention != "sdpa" else None,
            "spill_bytes": int(service.spill_gib * 2**30) if service.spill_gib else None,
            "files_dir": BATCHES_MOUNT if service.files_claim else None,
            "api_keys": f"{KEYS_MOUNT}/{KEYS_FILE}" if keys else None,
            "adapters": tuple(f"{adapter.name}={self._entry(adapter)}" for adapter in service.adapters) or None,
            # With keys `/metrics` asks for one: Prometheus reads it here, and the NetworkPolicies let nobody else in.
            "admin_host": "0.0.0.0" if keys else None,  # noqa: S104 — a pod's own network
            "admin_port": "$(ADMIN_PORT)" if keys else None,
        }

    def _probe(self, path: str) -> core.HTTPGetActionArgs:
        return core.HTTPGetActionArgs(path=path, port="http")


def command(runtime: Runtime, values: Values) -> list[str]:
    """The words of the runtime with `values` in the place of placeholders; a flag without its value is left out, and one of
    several values is said several times."""
    words = [word.format_map(values) for word in runtime.command]
    for flag, template in runtime.flags.items():
        told = {name: values[name] for name in placeholders(template)}
        if None in told.values():
            continue
        for one in product(*(value if isinstance(value, tuple) else (value,) for value in told.values())):
            value = template.format_map(dict(zip(told, one, strict=True)))
            words += [f"{flag}{value}"] if flag.endswith("=") else [flag, value]
    return words


def ports(service: Service, runtime: Runtime) -> dict[str, int]:
    """Named ports of a replica."""
    found = {"http": runtime.port}
    if runtime.metrics.port:
        found["metrics"] = runtime.metrics.port
    if service.api_keys_secret:
        found["admin"] = ADMIN_PORT
    return found


def scraped_port(service: Service, runtime: Runtime) -> str:
    """Name of the port where a replica's metrics are read without an API key."""
    return "admin" if service.api_keys_secret else "metrics" if runtime.metrics.port else "http"


def ready_path(service: Service, runtime: Runtime) -> str:
    """Path that answers 200 when a request would be answered now."""
    return runtime.ready.format(served_name=service.model)


def cache_claim(service: Service) -> str:
    """Name of the volume that keeps a service's caches."""
    return f"{service.name}-cache"
