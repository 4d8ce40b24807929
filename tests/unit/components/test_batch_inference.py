"""Batches as Jobs: one pod a shard, tried again, named after what it makes; and `slipway batch`, which adds one to a stack."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from infra.cli.main import app
from infra.spec import StackError

from .conftest import STACKS, Json, Objects

BATCH: Json = {
    "name": "reviews",
    "input": "s3://acme-reviews/2026/*.jsonl",
    "output": "s3://acme-reviews/answers",
    "model": "code-1b",
    "pool": "serve",
    "gpus": 1,
    "resources": {"cpus": 3, "memory_gib": 24},
    "shards": 12,
    "at_once": 4,
    "kv_gib": 24,
}


def job(objects: Objects) -> Json:
    return objects.one("Job", "batch-reviews")


def test_a_batch_is_an_indexed_job_that_survives_evictions_and_gives_up_on_bad_input(
    rendered: Callable[..., Objects],
) -> None:
    objects = rendered("prod", {"batches": [BATCH]})
    spec = job(objects)["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (12, 4, "Indexed")
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (6, 0)
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore", "Ignore", "FailJob"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    channel = "s3://acme-slipway-prod/models/code-1b/channels/production.json"
    assert container["command"][:4] == ["python", "-m", "serving.offline", channel]
    said = dict(zip(container["command"][4::2], container["command"][5::2], strict=True))
    assert said["--input"] == BATCH["input"]
    assert said["--shards"] == "12"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["serviceAccountName"] in objects.names("ServiceAccount")
    assert "batch-reaches-object-store" in objects.names("NetworkPolicy")


def test_a_stack_without_batches_has_nothing_of_them(prod: Objects) -> None:
    assert "batch" not in prod.names("ServiceAccount")
    assert not any("batch" in name for name in prod.names("NetworkPolicy") | prod.names("Job"))


def test_its_name_follows_what_it_makes(rendered: Callable[..., Objects]) -> None:
    def name(**keys: object) -> str:
        return job(rendered("prod", {"batches": [BATCH | keys]}))["metadata"]["name"]

    assert name(kv_gib=20) == name()
    assert name(input="s3://acme-reviews/2027/*.jsonl") != name()


def test_a_volume_is_mounted_for_what_is_in_no_object_store(rendered: Callable[..., Objects]) -> None:
    keys = {"volume_claim": "shared", "input": "/batch/in.jsonl", "output": "/batch/out"}
    pod = job(rendered("prod", {"batches": [BATCH | keys]}))["spec"]["template"]["spec"]
    assert "/batch" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]


def test_what_contradicts_itself_is_refused_at_its_line(rendered: Callable[..., Objects]) -> None:
    with pytest.raises(StackError, match=r"batches\.0\.output: the answers would lie among the requests"):
        rendered("prod", {"batches": [BATCH | {"output": "s3://acme-reviews/2026/*.jsonl"}]})
    with pytest.raises(StackError, match=r"batches\.0\.pool: node pool 'srve' does not exist"):
        rendered("prod", {"batches": [BATCH | {"pool": "srve"}]})
    on_volume = {"volume_claim": "shared", "input": "/batch/in.jsonl", "output": "/elsewhere"}
    for unseen, key in (({"input": "in.jsonl"}, "input"), (on_volume, "output")):
        with pytest.raises(StackError, match=rf"batches\.0\.{key}: no pod of a cluster sees "):
            rendered("prod", {"batches": [BATCH | unseen]})


def test_what_the_engine_is_told(rendered: Callable[..., Objects]) -> None:
    narrow = {"gpus": 0, "quantize": "int4", "speculate_tokens": 2}
    local = {
        "pool": "laptop",
        "model": "pylib",
        "resources": {"cpus": 1, "memory_gib": 2},
        "input": "s3://a/in.jsonl",
        "output": "s3://a/out",
    }
    (job,) = [
        job
        for job in rendered("local", {"batches": [BATCH | local | narrow]}).kind("Job")
        if "batch" in job["metadata"]["name"]
    ]
    words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [words[words.index(flag) + 1] for flag in ("--quantize", "--speculate-tokens")] == ["int4", "2"]
    with pytest.raises(StackError, match=r"batches\.0\.quantize: on a GPU these weights"):
        rendered("prod", {"batches": [BATCH | narrow | {"gpus": 1}]})


def test_the_command_adds_a_batch_to_the_stacks_manifests(tmp_path: Path) -> None:
    words = ["batch", "s3://a/in.jsonl", "s3://a/out", "-s", "prod", "--shards", "3", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["answers"] == "s3://a/out/answers.jsonl"
    (made,) = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("*-job-batch-batch-*.yaml")]
    assert made["metadata"]["name"] == said["job"]
    service = yaml.safe_load((STACKS / "Pulumi.prod.yaml").read_text())["config"]["slipway:services"][0]
    words = made["spec"]["template"]["spec"]["containers"][0]["command"]
    assert words[words.index("--kv-bytes") + 1] == str(service["kv_gib"] * 2**30)
    assert made["spec"]["completions"] == 3


def test_the_command_takes_over_the_cache_that_a_service_leaves_to_the_planner(
    changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = changed("prod", {"services.0.kv_share": 0.5})
    document = yaml.safe_load(file.read_text())
    del document["config"]["slipway:services"][0]["kv_gib"]
    stacks = tmp_path / "project" / "stacks"
    stacks.mkdir(parents=True)
    (stacks / file.name).write_text(yaml.safe_dump(document))
    (stacks.parent / "Pulumi.yaml").touch()
    monkeypatch.chdir(stacks.parent)
    words = ["batch", "s3://a/in.jsonl", "s3://a/out", "-s", "prod", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (made,) = [yaml.safe_load(path.read_text()) for path in (tmp_path / "out").glob("*-job-batch-batch-*.yaml")]
    words = made["spec"]["template"]["spec"]["containers"][0]["command"]
    assert int(words[words.index("--kv-bytes") + 1]) > 10 << 30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-s", "prod", "--name", "Bad Name", "--out", "x"], "--name: must be lower-case letters"),
        (
            ["-s", "prod", "--endpoint", "/v1/chat", "--out", "x"],
            '--endpoint: "/v1/chat" is no choice; there is /v1/chat/c',
        ),
        (["-s", "prod", "--shards", "10001", "--out", "x"], "--shards: must be at most 10000"),
        (["-s", "prod"], "stack 'prod' is on aws. Fix: --out DIR"),
        (["-s", "prod", "--service", "chta", "--out", "x"], "service 'chta' does not exist; did you mean 'chat'?"),
    ],
)
def test_what_the_command_will_not_do(words: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["batch", "s3://a/in.jsonl", "s3://a/out", *words])
    assert done.exit_code != 0
    assert says in str(done.exception)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (["/tmp/in.jsonl", "s3://a/out"], "/tmp/in.jsonl is below /tmp, which is each pod's own"),
        (["in.jsonl", "s3://a/out", "-s", "prod", "--out", "x"], "no pod of a cluster sees in.jsonl. Fix: a URL"),
        (["s3://a/in", "s3://a/in/"], "OUTPUT: the answers would lie among the requests"),
        (["", "s3://a/out"], "INPUT: must not be empty"),
    ],
)
def test_a_place_that_no_pod_can_use_is_refused(places: list[str], says: str) -> None:
    assert says in str(CliRunner().invoke(app, ["batch", *places]).exception)
