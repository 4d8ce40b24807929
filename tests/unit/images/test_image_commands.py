"""docker buildx is asked in the words of its documentation, for images whose digests do not know when they were built.

Docker is a recorder here, which writes an archive where it is told to: no engine runs on this machine.
https://docs.docker.com/reference/cli/docker/buildx/build/; https://docs.docker.com/build/exporters/oci-docker/
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from infra.clouds.local import ClusterError, Places
from infra.images import builder
from infra.images.builder import BOOTSTRAP, Recipe

CONFIG = json.dumps(
    {"config": {"User": "65532:65532"}, "rootfs": {"type": "layers", "diff_ids": ["sha256:1"]}}
).encode()
RECORDER = """#!PYTHON
import json, os, shutil, sys
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps(sys.argv[1:]) + "\\n")
for word in sys.argv:
    if word.startswith("type=docker,dest="):
        shutil.copy(os.environ["ARCHIVE"], word.split("dest=")[1].split(",")[0])
sys.exit(os.environ["FAILS"] in sys.argv and print("no space left", file=sys.stderr) is None)
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What docker was asked, a JSON list a line."""
    program, record = tmp_path / "bin" / "docker", tmp_path / "record"
    program.parent.mkdir()
    program.write_text(RECORDER.replace("PYTHON", sys.executable))
    program.chmod(0o755)
    with tarfile.open(tmp_path / "archive", "w") as archive:
        manifest = json.dumps([{"Config": "blobs/sha256/1", "Layers": []}]).encode()
        for name, content in (("manifest.json", manifest), ("blobs/sha256/1", CONFIG)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name, value in (("RECORD", str(record)), ("ARCHIVE", str(tmp_path / "archive")), ("FAILS", "nothing")):
        monkeypatch.setenv(name, value)
    return record


def recipe(tmp_path: Path, *, base: str = "python:3.11") -> Recipe:
    return Recipe(
        name="trainer",
        reference="slipway-trainer:1",
        content="1",
        dockerfile=tmp_path / "Dockerfile",
        context=tmp_path,
        contexts={"inside": tmp_path / "inside"},
        base=base,
        arguments={"ACCELERATOR": "cpu"},
    )


def build(tmp_path: Path, recipe: Recipe) -> str:
    places = Places(state=tmp_path / "state", cache=tmp_path / "cache")
    return builder.build(recipe, tmp_path / "out.tar", places=places, say=print)


def test_an_image_is_built_for_its_content_alone(docker: Path, tmp_path: Path) -> None:
    digest = build(tmp_path, recipe(tmp_path))
    assert json.loads(docker.read_text().splitlines()[-1]) == [
        *("buildx", "build", "--sbom=false", "--provenance=false", "--output"),
        f"type=docker,dest={tmp_path}/out.tar,name=docker.io/library/slipway-trainer:1,rewrite-timestamp=true",
        f"--build-context=inside={tmp_path}/inside",
        *("--build-arg=BASE=python:3.11", "--build-arg=SOURCE_DATE_EPOCH=0", "--build-arg=ACCELERATOR=cpu"),
        *("--file", f"{tmp_path}/Dockerfile", str(tmp_path)),
    ]
    assert digest == f"sha256:{hashlib.sha256(CONFIG).hexdigest()}"


def test_a_build_that_fails_says_why_and_leaves_no_older_archive(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.tar").write_bytes(b"of an older build")
    monkeypatch.setenv("FAILS", "--file")
    monkeypatch.setenv("ARCHIVE", "/dev/null")
    with pytest.raises(ClusterError, match=r"slipway-trainer:1 cannot be built: no space left"):
        build(tmp_path, recipe(tmp_path))
    assert (tmp_path / "out.tar").read_bytes() == b""


def test_docker_pulls_its_base(docker: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="--base with a reference"):
        build(tmp_path, recipe(tmp_path, base=BOOTSTRAP))
