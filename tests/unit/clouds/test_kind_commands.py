"""kind and Docker are asked in the words of their documentation. Both are recorders here: neither runs on this machine.

https://kind.sigs.k8s.io/docs/user/quick-start/; https://docs.docker.com/reference/cli/docker/container/ls/
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.clouds.local import ClusterError, kind

Said = list[list[str]]
# Writes down what it is asked, and answers what its environment says for its first two words.
RECORDER = """#!PYTHON
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
answers = json.loads(os.environ["ANSWERS"])
code, text = answers.get(" ".join(sys.argv[1:3]), [0, ""])
print(text)
sys.exit(code)
"""
Recorder = Callable[..., Callable[[], Said]]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """`recorder({"docker info": (1, "")})` puts kind and docker on PATH; calling what it returns gives what they were asked."""

    def start(answers: dict[str, tuple[int, str]]) -> Callable[[], Said]:
        for name in ("kind", "docker"):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(RECORDER.replace("PYTHON", sys.executable))
            program.chmod(0o755)
        record = tmp_path / "record"
        record.touch()
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("RECORD", str(record))
        monkeypatch.setenv("ANSWERS", json.dumps(answers))
        return lambda: [json.loads(line) for line in record.read_text().splitlines()]

    return start


def asked_of_kind(said: Said) -> Said:
    return [words[1:] for words in said if words[0] == "kind"]


def test_a_cluster_is_made_where_there_is_none(recorder: Recorder, tmp_path: Path) -> None:
    said = recorder({})
    kubeconfig = tmp_path / "state" / "kubeconfig"
    kind.up(kubeconfig, cache=tmp_path, say=print)
    assert ["docker", "ps", "--all", "--quiet", "--filter", "label=io.x-k8s.kind.cluster=slipway"] in said()
    create = ["create", "cluster", "--name", "slipway", "--kubeconfig", str(kubeconfig), "--wait", "120s"]
    assert asked_of_kind(said()) == [create]
    assert kubeconfig.parent.is_dir()


def test_a_cluster_that_is_there_is_taken_with_its_kubeconfig(recorder: Recorder, tmp_path: Path) -> None:
    said = recorder({"ps --all": (0, "c0ffee")})
    kind.up(tmp_path / "kubeconfig", cache=tmp_path, say=print)
    export = ["export", "kubeconfig", "--name", "slipway", "--kubeconfig", str(tmp_path / "kubeconfig")]
    assert asked_of_kind(said()) == [export]


def test_a_cluster_that_a_killed_up_left_is_made_again(recorder: Recorder, tmp_path: Path) -> None:
    said = recorder({"ps --all": (0, "c0ffee"), "export kubeconfig": (1, "no such file")})
    kind.up(tmp_path / "kubeconfig", cache=tmp_path, say=print)
    assert [words[:2] for words in asked_of_kind(said())] == [
        ["export", "kubeconfig"],
        ["delete", "cluster"],
        ["create", "cluster"],
    ]


def test_images_go_in_as_archives_and_the_cluster_goes_by_its_name(recorder: Recorder, tmp_path: Path) -> None:
    said = recorder({})
    kind.load(tmp_path / "trainer.tar", cache=tmp_path)
    kind.down(tmp_path)
    assert asked_of_kind(said()) == [
        ["load", "image-archive", str(tmp_path / "trainer.tar"), "--name", "slipway"],
        ["delete", "cluster", "--name", "slipway"],
    ]


def test_docker_without_an_engine_is_no_docker(recorder: Recorder) -> None:
    recorder({"info": (1, "")})
    assert not kind.is_possible()
    assert not kind.is_up()


def test_a_kind_that_fails_is_told_in_its_words(recorder: Recorder, tmp_path: Path) -> None:
    recorder({"create cluster": (1, "")})
    with pytest.raises(ClusterError, match=r"^kind: "):
        kind.up(tmp_path / "kubeconfig", cache=tmp_path, say=print)
