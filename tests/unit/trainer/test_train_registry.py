"""The registry: content-addressed, whole or absent, on a file system and on an object store alike; the gate before it."""

import json
import re
import uuid
from pathlib import Path

import fsspec
import object_store  # noqa: F401  # bucket://
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import GateConfig
from trainer.errors import Failed, Refused
from trainer.files import canonical_json, digest_of, sha256_of_file
from trainer.log import Log
from trainer.publish import judge
from trainer.registry import Registry, check_name

LOG = Log(rank=1)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    directory = tmp_path / "package"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(256)))
    (directory / "sub" / "shard.bin").write_bytes(b"x" * 1000)
    return directory


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path: Path) -> str:
    """A registry on disk, and one on a store that has no rename and no directories."""
    return str(tmp_path / "registry") if request.param == "file" else f"bucket://{uuid.uuid4().hex}"


def test_published_package_is_addressed_by_its_content(url: str, package: Path) -> None:
    registry = Registry.open(url)
    digest = registry.publish(package, name="m", log=LOG)
    root = f"{registry.root}/models/m/{digest}"
    manifest = json.loads(registry.filesystem.cat_file(f"{root}/manifest.json"))
    assert digest_of(manifest) == digest
    assert registry.filesystem.cat_file(f"{root}/manifest.json") == canonical_json(manifest)
    for path, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of_file(package / path)
        assert registry.filesystem.cat_file(f"{root}/{path}") == (package / path).read_bytes()
    assert registry.publish(package, name="m", log=LOG) == digest


def test_one_changed_byte_is_another_digest(url: str, package: Path) -> None:
    registry = Registry.open(url)
    first = registry.publish(package, name="m", log=LOG)
    (package / "config.json").write_text("{ }")
    assert registry.publish(package, name="m", log=LOG) != first


def test_channel_moves_and_keeps_its_history(url: str) -> None:
    registry = Registry.open(url)
    assert registry.channel("m", "production") is None
    for digest in ("a" * 64, "b" * 64):
        registry.move_channel("m", "production", digest=digest, report={"bits_per_byte": 2.0})
    channel = registry.channel("m", "production")
    assert channel is not None
    assert channel["digest"] == "b" * 64
    assert [entry["digest"][0] for entry in channel["history"]] == ["a", "b"]


def test_damaged_channel_is_told_and_not_overwritten(url: str) -> None:
    registry = Registry.open(url)
    registry.move_channel("m", "production", digest="a" * 64, report={})
    path = f"{registry.root}/models/m/channels/production.json"
    registry.filesystem.pipe_file(path, b"{broken")
    with pytest.raises(Failed, match="damaged"):
        registry.move_channel("m", "production", digest="b" * 64, report={})
    assert registry.filesystem.cat_file(path) == b"{broken"


def test_interrupted_publish_on_disk_leaves_no_part(tmp_path: Path, package: Path, monkeypatch) -> None:
    registry = Registry.open(str(tmp_path / "registry"))
    copy = registry.filesystem.put_file
    calls = []

    def fails_at_the_second(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(registry.filesystem, "put_file", fails_at_the_second)
    with pytest.raises(OSError, match="No space"):
        registry.publish(package, name="m", log=LOG)
    assert [path.name for path in (tmp_path / "registry" / "models" / "m").iterdir()] == []


def test_interrupted_publish_on_a_store_is_no_model(package: Path, monkeypatch) -> None:
    registry = Registry.open(f"bucket://{uuid.uuid4().hex}")
    monkeypatch.setattr(registry.filesystem, "pipe_file", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        registry.publish(package, name="m", log=LOG)
    assert not fsspec.filesystem("bucket").glob(f"{registry.root}/models/m/*/manifest.json")


@pytest.mark.parametrize("url", ["nosuch://bucket", "s3"])
def test_bad_registry_url(url: str) -> None:
    if url == "s3":
        assert Registry.open(url).is_local  # a plain word is a directory
    else:
        with pytest.raises(Refused, match="cannot open the registry"):
            Registry.open(url)


@given(st.text(max_size=20))
def test_a_name_is_one_path_segment(name: str) -> None:
    try:
        assert check_name(name) == name
    except Refused:
        return
    assert "/" not in name
    assert not name.startswith(".")
    assert re.fullmatch(r"[\x21-\x7e]+", name)


@pytest.mark.parametrize(
    ("gate", "measured", "passes"),
    [
        ({"must_beat": "trigram"}, 1.9, True),
        ({"must_beat": "trigram"}, 2.1, False),
        ({"must_beat": "trigram"}, 2.0, False),
        ({"must_beat": "trigram"}, float("nan"), False),
        ({"must_beat": None, "max_bits_per_byte": 1.9}, 1.9, True),
        ({"must_beat": None, "max_bits_per_byte": 1.9}, 1.91, False),
        ({"must_beat": None, "max_bits_per_byte": 1.9}, float("nan"), False),
        ({"must_beat": "kneser_ney_5"}, 0.1, False),
    ],
)
def test_gate(gate: dict, measured: float, passes: bool) -> None:
    report = {"bits_per_byte": measured, "baselines": {"trigram": 2.0}}
    passed, why = judge(GateConfig.model_validate(gate), report)
    assert passed is passes
    assert why
