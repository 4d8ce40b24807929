"""Images of one program: the same bytes for the same program, with what a runtime needs to run them. And the names of images."""

import hashlib
import json
import tarfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from infra.clouds.local import archive
from infra.clouds.local.places import digest_of
from infra.images.builder import full_name


def test_the_same_program_is_the_same_image(tmp_path: Path) -> None:
    program = tmp_path / "hello"
    program.write_bytes(b"\x7fELF...")
    for name in ("one", "two"):
        archive.write(tmp_path / name, reference="localhost/hello:1", program=program)
        program.touch()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_blob_is_named_by_its_digest_and_the_layer_holds_the_program(tmp_path: Path) -> None:
    program = tmp_path / "hello"
    program.write_bytes(b"\x7fELF...")
    archive.write(tmp_path / "image", reference="localhost/hello:1", program=program, command=["/bin/hello", "forever"])
    with tarfile.open(tmp_path / "image") as image:
        blobs = {member.name: image.extractfile(member).read() for member in image.getmembers() if member.isfile()}  # type: ignore[union-attr]
    for name, blob in blobs.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(blob).hexdigest() == Path(name).name
    index = json.loads(blobs["index.json"])
    manifest = json.loads(blobs[f"blobs/sha256/{index['manifests'][0]['digest'].removeprefix('sha256:')}"])
    config = json.loads(blobs[f"blobs/sha256/{manifest['config']['digest'].removeprefix('sha256:')}"])
    assert config["config"]["Entrypoint"] == ["/bin/hello", "forever"]
    assert config["config"]["User"] == "65532:65532"


def test_short_names_are_completed_as_runtimes_do() -> None:
    assert full_name("slipway-trainer:1") == "docker.io/library/slipway-trainer:1"
    assert full_name("acme/trainer:1") == "docker.io/acme/trainer:1"
    assert full_name("localhost/base:1") == "localhost/base:1"
    assert full_name("ghcr.io/acme/trainer:1") == "ghcr.io/acme/trainer:1"
    assert full_name("registry:5000/trainer:1") == "registry:5000/trainer:1"


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_different_parts_have_different_digests(one: list[bytes], other: list[bytes]) -> None:
    assert (digest_of(one) == digest_of(other)) == (one == other)
