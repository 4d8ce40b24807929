"""Which change re-runs what: the digests in the names of the Jobs and of the ConfigMaps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.catalog import instance, instances
from infra.components.common import cpu_quantity, digest, memory_quantity
from infra.components.images import content_digest, reference_of, storage_drivers
from infra.components.pipeline import DAEMONSETS, helper_resources, pipeline, training_resources
from infra.spec import Images, Stack, load

STAGES = ("data", "train", "promote")


def digests(stack: Stack, *, image: str = "content", url: str = "file:///registry") -> dict[str, str]:
    assert stack.training
    made = pipeline(stack.training, image_digest=image, registry_url=url)
    return {"data": made.data_digest, "train": made.train_digest, "promote": made.promote_digest}


@pytest.mark.parametrize(
    ("change", "reruns"),
    [
        ({"training.data.vocab_size": 512}, {"data", "train", "promote"}),
        ({"training.data.seed": 1}, {"data", "train", "promote"}),
        ({"training.steps": 601}, {"train", "promote"}),
        ({"training.optim.lr": 1e-3}, {"train", "promote"}),
        ({"training.model.layers": 5}, {"train", "promote"}),
        ({"training.seed": 1}, {"train", "promote"}),
        ({"training.evaluate.max_tokens": 1000}, {"promote"}),
        ({"training.gate.max_bits_per_byte": 2.0}, {"promote"}),
        ({"training.channel": "candidate"}, {"promote"}),
        ({"training.nproc_per_node": 1}, set()),
        ({"training.max_restarts": 1}, set()),
        ({"training.resources.cpus": 1}, set()),
        ({"services.0.replicas": 3}, set()),
        ({"router.policy": "maglev"}, set()),
        ({"storage.runs_gib": 60}, set()),
    ],
)
def test_a_change_reruns_what_it_touches_and_nothing_else(
    changed: Callable[..., Path], change: dict[str, Any], reruns: set[str]
) -> None:
    before, after = digests(load(changed("local", {}))), digests(load(changed("local", change)))
    assert {stage for stage in STAGES if before[stage] != after[stage]} == reruns


def test_a_new_image_reruns_all_and_a_new_registry_the_promotion(changed: Callable[..., Path]) -> None:
    stack = load(changed("local", {}))
    before = digests(stack)
    assert all(before[stage] != digests(stack, image="other")[stage] for stage in STAGES)
    moved = digests(stack, url="s3://elsewhere")
    assert {stage for stage in STAGES if before[stage] != moved[stage]} == {"promote"}


def test_a_changed_gate_reuses_the_evaluation(changed: Callable[..., Path]) -> None:
    def evaluation(values: dict[str, Any]) -> str:
        training = load(changed("local", values)).training
        assert training
        return pipeline(training, image_digest="content", registry_url="file:///registry").evaluation

    assert evaluation({}) == evaluation({"training.gate.must_beat": "unigram"})
    assert evaluation({}) != evaluation({"training.evaluate.max_tokens": 7})


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.lists(st.text(max_size=5), max_size=3), max_size=5))
def test_a_digest_does_not_know_the_order_of_keys(value: dict[str, Any]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


@given(st.floats(min_value=0.01, max_value=1024), st.floats(min_value=0.01, max_value=4096))
def test_quantities_are_never_more_than_what_was_asked(cpus: float, gib: float) -> None:
    cpu, memory = cpu_quantity(cpus), memory_quantity(gib)
    assert (float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)) <= cpus
    assert float(memory[:-2]) / (1 if memory.endswith("Gi") else 1024) <= gib


@pytest.mark.parametrize("name", sorted(instances()))
def test_a_training_pod_leaves_room_for_what_runs_beside_it(changed: Callable[..., Path], name: str) -> None:
    training = load(changed("prod", {})).training
    assert training
    machine = instance(name)
    main, helper = training_resources(training, machine), helper_resources(training, machine)
    if machine.cpus >= 4:
        assert main.cpus + 2 * helper.cpus + DAEMONSETS.cpus <= machine.allocatable_cpus
        assert main.memory_gib + 2 * helper.memory_gib + DAEMONSETS.memory_gib <= machine.allocatable_gib


def repository(root: Path, files: dict[str, str]) -> Path:
    whole = {
        "pyproject.toml": '[project.optional-dependencies]\ntrainer = ["torch"]\nserving = ["fastapi"]\n',
        "constraints.txt": "torch==2.0\n",
        "trainer/Dockerfile": "FROM x\n",
        "trainer/model.py": "a = 1\n",
        "serving/Dockerfile": "FROM x\n",
    }
    for name, text in (whole | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "same"),
    [
        ({}, True),
        ({"trainer/__pycache__/model.pyc": "junk"}, True),
        ({"trainer/.cache": "junk"}, True),
        ({"serving/app.py": "b = 2\n"}, True),
        ({"trainer/model.py": "a = 2\n"}, False),
        ({"trainer/new.py": ""}, False),
        ({"trainer/Dockerfile": "FROM y\n"}, False),
        ({"constraints.txt": "torch==2.1\n"}, False),
    ],
)
def test_an_images_digest_is_that_of_its_content(tmp_path: Path, files: dict[str, str], same: bool) -> None:
    before = content_digest("trainer", base="python:3.11", root=repository(tmp_path / "before", {}))
    after = content_digest("trainer", base="python:3.11", root=repository(tmp_path / "after", files))
    assert (before == after) is same
    assert before != content_digest("trainer", base="python:3.12", root=tmp_path / "before")
    assert before != content_digest("trainer", base="python:3.11", drivers=("s3fs",), root=tmp_path / "before")


@pytest.mark.parametrize(
    ("images", "reference"),
    [
        (Images(), "slipway-trainer:abc"),
        (Images(registry="ghcr.io/acme/"), "ghcr.io/acme/trainer:abc"),
        (Images(trainer="localhost:5000/t"), "localhost:5000/t:abc"),
        (Images(trainer="localhost:5000/t:v1"), "localhost:5000/t:v1"),
        (Images(trainer="t@sha256:00"), "t@sha256:00"),
    ],
)
def test_references_carry_the_content_unless_the_user_names_a_tag(images: Images, reference: str) -> None:
    assert reference_of(images, "trainer", content="abc") == reference


def test_an_image_holds_the_drivers_of_the_stores_that_it_opens() -> None:
    assert storage_drivers(["s3://a", "s3://b", "/srv/corpus", "file:///x", "gs://c"]) == ("gcsfs", "s3fs")
