"""S3 by a real server (nanio) and fsspec's own client: nothing else is told apart."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import s3fs
from programs_of_trainer import TRAIN, program_environment, run_program
from test_train_sources import QUIET, config_of

from tests.ports import free_port
from trainer.config import TrainConfig
from trainer.data import make_dataset
from trainer.errors import Interrupted, StopSignal
from trainer.registry import Registry
from trainer.shapes import weights_digest
from trainer.storage import Storage
from trainer.train import train


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The variables by which clients find it; its one bucket is `ours`."""
    (root := tmp_path_factory.mktemp("buckets") / "ours").mkdir()
    port, secret = free_port(), "not-much-of-a-secret"
    own = program_environment(NANIO_ACCESS_KEY="we", NANIO_SECRET_KEY=secret)
    command = [sys.executable, "-m", "nanio", "serve", "--data-dir", root.parent, "--host", "127.0.0.1"]
    process = subprocess.Popen([*map(str, command), "--port", str(port)], env=own, stderr=subprocess.DEVNULL)
    end_s = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        except urllib.error.HTTPError:
            break  # it asks for a key
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.1)
    yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "we", "AWS_SECRET_ACCESS_KEY": secret}
    process.terminate()
    process.wait()


@pytest.fixture
def bucket(server, monkeypatch) -> str:
    for name, value in {**server, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return "s3://ours"


def test_a_run_keeps_its_checkpoints_there_and_goes_on_from_them(bucket, dataset, tmp_path):
    config, stop = TrainConfig.model_validate(TRAIN), StopSignal()
    place = {"data": dataset, "run": tmp_path / "run", "checkpoints": f"{bucket}/runs/one"}
    with pytest.raises(Interrupted):
        train(config, stop=stop, on_step=lambda done, _: setattr(stop, "received", done >= 6 or None), **place)
    assert Storage(place["checkpoints"]).steps() == [4, 7]
    train(config, stop=StopSignal(), **place)
    assert Storage(place["checkpoints"]).steps() == [7, 8, 12]
    train(config, data=dataset, run=tmp_path / "undisturbed", stop=StopSignal())
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("run", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_corpus_is_read_from_there_and_a_model_published_there(bucket, corpus, tmp_path):
    store = s3fs.S3FileSystem()
    store.put(f"{corpus}/*.txt", "ours/corpus/")
    for source in (f"{bucket}/corpus", str(corpus)):
        about = config_of({"kind": "text", "path": source}, vocab_size=300)
        make_dataset(about, tmp_path / source.split(":")[0].strip("/").replace("/", "-"), log=QUIET)
    digests = {json.loads(path.read_text())["data_digest"] for path in tmp_path.glob("*/manifest.json")}
    assert len(digests) == 1

    package = tmp_path / "package"
    package.mkdir()
    (package / "config.json").write_text("{}")
    registry = Registry.open(f"{bucket}/registry")
    digest = registry.publish(package, name="m", log=QUIET)
    registry.move_channel("m", "production", digest=digest, report={})
    assert registry.channel("m", "production")["digest"] == digest  # pyright: ignore[reportOptionalSubscript]
    assert store.exists(f"ours/registry/models/m/{digest}/manifest.json")


@pytest.mark.parametrize("program", ["trainer.data", "trainer", "trainer.publish"])
def test_a_store_that_does_not_answer_is_told_in_one_line(bucket, dataset, train_yaml, tmp_path, program):
    nowhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    (tmp_path / "data.yaml").write_text(f'source: {{kind: text, path: "{bucket}/corpus"}}')
    (package := tmp_path / "package").mkdir()
    for name in ("config.json", "tokenizer.json", "slipway.json", "model.safetensors"):
        (package / name).write_text("{}")
    report = {"bits_per_byte": 1, "baselines": {}, "model_digest": weights_digest(package)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "publish.yaml").write_text("gate: {must_beat: null}")
    publish = ["--config", tmp_path / "publish.yaml", f"model={package}", f"report={tmp_path / 'report.json'}"]
    words = {
        "trainer.publish": [*publish, f"registry={bucket}/registry", "name=m", "channel=production"],
        "trainer.data": ["--config", tmp_path / "data.yaml", f"out={tmp_path / 'out'}"],
        "trainer": ["--config", train_yaml, f"data={dataset}", f"run={tmp_path / 'run'}", f"checkpoints={bucket}/x"],
    }
    ended = run_program(program, *words[program], **nowhere)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "does not answer" in ended.stderr
