"""From a pod template to arguments, environment, files and ports."""

import json
import os
from pathlib import Path

import pytest
import yaml

from infra.local.addresses import AddressBook
from infra.local.objects import ManifestError, Manifests, int_or_percent, quantity
from infra.local.plan import Planner, PodPlan

TRAINING = """
apiVersion: v1
kind: Service
metadata: {name: train, namespace: team}
spec: {clusterIP: None, selector: {job-name: train}, ports: [{port: 29400}]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: train, namespace: team}
spec:
  completionMode: Indexed
  completions: 2
  parallelism: 2
  template:
    metadata: {labels: {tier: gold}, annotations: {note: hello}}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 90
      volumes:
      - {name: data, persistentVolumeClaim: {claimName: corpus}}
      - {name: config, configMap: {name: train}}
      - {name: keys, secret: {secretName: keys, items: [{key: token, path: t/k}]}}
      - {name: shm, emptyDir: {medium: Memory}}
      containers:
      - name: trainer
        command: [python, -m, trainer.launch]
        args: [--rdzv-endpoint=$(RDZV_ENDPOINT), --, --config, /etc/slipway/train.yaml, data=/data, $$(RDZV_ENDPOINT)]
        ports: [{name: rdzv, containerPort: 29400}, {name: metrics, containerPort: 9090}]
        env:
        - {name: METRICS_PORT, value: "9090"}
        - {name: RDZV_ENDPOINT, value: "$(HEAD).train.team.svc.cluster.local:29400"}
        - {name: HEAD, value: train-0}
        - {name: FIRST, value: train-0}
        - {name: SECOND, value: "$(FIRST).train:29400"}
        - {name: SELF, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: WHERE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
        - {name: TIER, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}
        - {name: INDEX, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}}
        - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: OMP_NUM_THREADS, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
        - {name: MEMORY_MIB, valueFrom: {resourceFieldRef: {resource: requests.memory, divisor: 1Mi}}}
        - {name: LEVEL, valueFrom: {configMapKeyRef: {name: train, key: level}}}
        - {name: TOKEN, valueFrom: {secretKeyRef: {name: keys, key: token}}}
        - {name: ABSENT, valueFrom: {configMapKeyRef: {name: none, key: x, optional: true}}}
        envFrom: [{prefix: C_, configMapRef: {name: train}}]
        resources: {limits: {cpu: 1500m}, requests: {memory: 2Gi}}
        volumeMounts:
        - {name: data, mountPath: /data, subPath: tokens}
        - {name: config, mountPath: /etc/slipway}
        - {name: keys, mountPath: /keys}
        - {name: shm, mountPath: /dev/shm}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: train, namespace: team}
data: {train.yaml: "steps: 10 # /data stays here", level: info}
---
apiVersion: v1
kind: Secret
metadata: {name: keys, namespace: team}
data: {token: aHVudGVyMg==}
"""


def manifests(text: str) -> Manifests:
    return Manifests(tuple(yaml.safe_load_all(text)))


def plan(text: str, state_dir: str = "/state") -> PodPlan:
    found, book = manifests(text), AddressBook()
    book.update(found)
    return Planner(manifests=found, book=book, state_dir=Path(state_dir)).pod(found.workloads[0], 0)


def test_a_training_pod(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("NO_PROXY", "example.com")
    found, book = manifests(TRAINING), AddressBook()
    book.update(found)
    planner = Planner(manifests=found, book=book, state_dir=Path("/state"))
    head, second = (planner.pod(found.workloads[0], slot) for slot in (0, 1))
    (container,) = second.containers
    own, env = Path("/state/pods/train-1"), container.env
    rendezvous = f"127.0.0.1:{head.ports['rdzv']}"

    assert container.argv[1:3] == ["-m", "trainer.launch"]
    # a variable declared later is not known, as in Kubernetes
    assert container.argv[3] == "--rdzv-endpoint=$(HEAD).train.team.svc.cluster.local:29400"
    assert container.argv[4:] == [
        "--",
        "--config",
        f"{own}/volumes/config/train.yaml",
        "data=/state/volumes/corpus/tokens",
        "$(RDZV_ENDPOINT)",
    ]
    assert env["SECOND"] == rendezvous
    assert env["METRICS_PORT"] == str(second.ports["metrics"]) != str(head.ports["metrics"])
    assert (env["RDZV_PORT"], env["JOB_COMPLETION_INDEX"], env["INDEX"]) == (str(second.ports["rdzv"]), "1", "1")
    assert (env["SELF"], env["WHERE"], env["TIER"], env["IP"]) == ("train-1", "team", "gold", "127.0.0.1")
    assert (env["OMP_NUM_THREADS"], env["MEMORY_MIB"]) == ("2", "2048")
    assert (env["LEVEL"], env["TOKEN"], env["C_level"]) == ("info", "hunter2", "info")
    assert "ABSENT" not in env
    assert "AWS_SECRET_ACCESS_KEY" not in env
    assert env["NO_PROXY"] == "example.com,127.0.0.1,localhost"
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(Path(__file__).parents[3])
    assert second.files[own / "volumes/config/train.yaml"] == "steps: 10 # /data stays here"
    assert {path: text for path, text in second.files.items() if "keys" in str(path)} == {
        own / "volumes/keys/t/k": "hunter2"
    }
    assert (second.grace_s, second.restart_policy) == (90, "Never")


def pod(container: str = "", spec: str = "", other: str = "") -> str:
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  template:
    metadata: {{labels: {{app: web}}}}
    spec: {{containers: [{{name: main, command: [sh], {container}}}], {spec}}}
{other}"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (pod("command: null"), ["no command", "container main of Deployment/web"]),
        (pod("volumeMounts: [{name: x, mountPath: /x}]"), ["no volume 'x'"]),
        (pod(spec="volumes: [{name: x, nfs: {server: a}}]"), ["volume 'x'", "Use a claim"]),
        (pod(spec="volumes: [{name: x, configMap: {name: gone}}]"), ["no ConfigMap 'gone'", "Deployment/web"]),
        (pod("readinessProbe: {httpGet: {port: http}}"), ["port http", "Declare the port"]),
        (pod("readinessProbe: {grpc: {port: 1}}"), ["no httpGet, tcpSocket or exec"]),
        (pod("env: [{name: A, valueFrom: {fieldRef: {fieldPath: status.phase}}}]"), ["unknown field status.phase"]),
        (pod("env: [{name: A, valueFrom: {secretKeyRef: {name: s, key: k}}}]"), ["no Secret 's'"]),
        (pod(spec="initContainers: [{name: s, command: [sh], restartPolicy: Always}]"), ["sidecar"]),
    ],
)
def test_what_cannot_run_here_is_refused_with_the_fix(text: str, words: list[str]):
    with pytest.raises(ManifestError) as refused:
        plan(text)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_two_workloads_of_one_name_are_refused():
    with pytest.raises(ManifestError, match="'web'"):
        _ = manifests(pod() + "---" + pod()).workloads


def test_replicas_come_from_the_autoscaler_where_they_are_omitted():
    autoscaler = """---
kind: HorizontalPodAutoscaler
metadata: {name: a}
spec: {minReplicas: 3, scaleTargetRef: {kind: Deployment, name: web}}
"""
    assert manifests(pod(other=autoscaler)).workloads[0].count == 3
    assert manifests(pod()).workloads[0].count == 1


SERVICES = """---
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
kind: Service
metadata: {name: pods}
spec: {selector: {app: web}, clusterIP: None, ports: [{name: x, port: 8000}]}
---
kind: Service
metadata: {name: public}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 8080, targetPort: http}]}
"""


def test_names_of_services_and_pods():
    found = manifests(pod("ports: [{name: http, containerPort: 8000}, {containerPort: 9000}]", other=SERVICES))
    book = AddressBook()
    book.update(found)
    (workload,) = found.workloads
    ports = book.ports(workload, 0)
    assert ports[8000] == 8080, "a LoadBalancer is published at its own port"
    assert ports[9000] != 9000
    assert book.ports(workload, 1)[8000] not in (8000, 8080)
    known = f"127.0.0.1:{ports[8000]}"

    def resolve(host: str, port: int, namespace: str = "default") -> str | None:
        return book.resolve(host, port, namespace=namespace)

    for host in (
        "web",
        "web.default",
        "web.default.svc",
        "web.default.svc.cluster.local",
        "web.default.svc.cluster.local.",
    ):
        assert resolve(host, 80) == known
    assert resolve("web.default", 80, namespace="other") == known
    assert resolve("web", 80, namespace="other") is None
    assert resolve("web", 8000) is None, "a Service with an address of its own has its own ports only"
    assert resolve("pods", 8000) == resolve("web-0.pods.default.svc", 8000) == known
    assert resolve("pods", 9000) == f"127.0.0.1:{ports[9000]}", "the name of a headless Service is the pod's address"
    assert resolve("web-7.pods", 8000) is None
    assert resolve("example.com", 80) is None
    book.update(found)
    assert book.ports(workload, 0) == ports, "ports stay"


ENVOY = """---
kind: ConfigMap
metadata: {name: envoy}
data:
  envoy.yaml: |
    admin: {access_log_path: /var/log/admin, address: {socket_address: {address: 0.0.0.0, port_value: 8000}}}
    static_resources:
      listeners: [{name: in, address: {socket_address: {address: 0.0.0.0, port_value: 9000}}}]
      clusters:
      - name: pool
        type: STRICT_DNS
        dns_lookup_family: V4_ONLY
        lb_policy: RING_HASH
        load_assignment:
          cluster_name: other
          endpoints:
          - lb_endpoints:
            - load_balancing_weight: 3
              endpoint: {hostname: h, address: {socket_address: {address: pods.default.svc, port_value: 8000}}}
      - {name: static, type: STATIC, load_assignment: {endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address:
          {address: 10.1.2.3, port_value: 443}}}}]}]}}
"""


@pytest.mark.parametrize("state_dir", ["/state", "/var/log/state"])  # the latter is below a mountPath of the pod's
def test_an_envoy_configuration(state_dir: str):
    mounts = "volumeMounts: [{name: c, mountPath: /etc/envoy}, {name: log, mountPath: /var/log}]"
    text = pod(
        f"ports: [{{name: admin, containerPort: 8000}}, {{name: in, containerPort: 9000}}], {mounts}",
        "volumes: [{name: c, configMap: {name: envoy}}, {name: log, emptyDir: {}}]",
        SERVICES.replace("8080", "18080") + ENVOY,
    )
    planned = plan(text, state_dir)
    config = yaml.safe_load(planned.files[planned.directory / "volumes/c/envoy.yaml"])
    assert config["admin"]["access_log_path"] == f"{planned.directory}/volumes/log/admin"
    assert config["admin"]["address"]["socket_address"] == {
        "address": "127.0.0.1",
        "port_value": planned.ports["admin"],
    }
    assert config["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"] == planned.ports["in"]
    pool, static = config["static_resources"]["clusters"]
    assert pool.keys() == {"name", "type", "lb_policy", "eds_cluster_config"}
    source = pool["eds_cluster_config"]["eds_config"]["path_config_source"]
    assert source["path"] == f"{state_dir}/pods/web-0/endpoints/envoy/pool.json"
    assert static["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"] == {
        "address": "10.1.2.3",
        "port_value": 443,
    }
    (file,) = planned.endpoint_files
    resource = json.loads(file.render(lambda _, port: [1001, 1002] if port == 8000 else None))["resources"][0]
    assert resource["cluster_name"] == "pool"
    assert resource["endpoints"][0]["lb_endpoints"] == [
        {
            "load_balancing_weight": 3,
            "endpoint": {"hostname": "h", "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}},
        }
        for port in (1001, 1002)
    ]


def test_the_envoy_program_shares_no_memory_with_another():
    assert plan(pod("command: [envoy, -c, x]")).containers[0].argv[-1] == "--disable-hot-restart"
    assert plan(pod("command: [envoy, --base-id, '3']")).containers[0].argv[-2:] == ["--base-id", "3"]


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("2", 2), (3, 3), ("1Gi", 2**30), ("1.5k", 1500), ("1e3", 1000), ("2M", 2e6)]
)
def test_quantities(text: str, number: float):
    assert quantity(text) == number


def test_a_quantity_that_is_none():
    with pytest.raises(ManifestError, match="'lots'"):
        quantity("lots")


def test_surge_rounds_up_and_unavailable_down():
    assert int_or_percent("25%", of=3, round_up=True) == 1
    assert int_or_percent("25%", of=3, round_up=False) == 0
    assert int_or_percent(2, of=3, round_up=True) == 2


def test_a_directory_of_manifests(tmp_path: Path):
    with pytest.raises(ManifestError, match="slipway render"):
        Manifests.load(tmp_path)
    (tmp_path / "plan.json").write_text('{"price": 1}')
    (tmp_path / "list.yaml").write_text("{apiVersion: v1, kind: List, items: [{kind: Secret, metadata: {name: a}}]}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "two.yml").write_text(
        "{apiVersion: v1, kind: Secret, metadata: {name: b}}\n---\n{apiVersion: v1, kind: Secret, metadata: {name: c}}"
    )
    assert sorted(o["metadata"]["name"] for o in Manifests.load(tmp_path).objects) == ["a", "b", "c"]
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ManifestError, match=r"bad\.yaml"):
        Manifests.load(tmp_path)
