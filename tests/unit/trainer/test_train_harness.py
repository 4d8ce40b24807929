"""lm-evaluation-harness asks a model of ours and counts what we would."""

import json
from pathlib import Path

import pytest
import torch

from trainer.config import EvaluateConfig, ModelConfig
from trainer.data import Dataset
from trainer.errors import Refused
from trainer.evaluate import evaluate
from trainer.export import export_package
from trainer.harness import measure_with_harness
from trainer.log import Log
from trainer.model import Decoder
from trainer.scoring import Writer, judge_continuation

CHOICES = [" return x", " import", " def"]


def task_of(**more):
    given = {"kind": "lm_eval", "name": "ours", "task": "ours", **more}
    return EvaluateConfig.model_validate({"tasks": [given], "baselines": [], "max_tokens": 200}).tasks[0]


@pytest.fixture(scope="module")
def model(dataset) -> Decoder:
    torch.manual_seed(0)
    shape = ModelConfig(layers=1, hidden=32, heads=2, kv_heads=1, ffn=32, max_context=48)
    model = Decoder(shape, vocab_size=Dataset.open(dataset).vocab_size).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


@pytest.fixture
def tasks(dataset, model, tmp_path, monkeypatch) -> Path:
    """Three tasks of eight questions: by likelihood, by what is written, and the likelihood of whole texts."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    writer, rows = Writer(model, Dataset.open(dataset)), []
    for number in range(8):
        question = f"def f{number}(x):\n   "
        ids = [writer.tokenizer.encode(question + choice).ids for choice in CHOICES]
        prompt = writer.tokenizer.encode(question.rstrip()).ids
        nats = [judge_continuation(model, prompt, each[len(prompt) :])[0] for each in ids]
        written = writer.go_on(question, max_tokens=5, stops=("\n",))
        rows.append(
            {
                "question": question,
                "choices": CHOICES,
                "answer": nats.index(min(nats)) if number % 4 else nats.index(max(nats)),
                "written": written if number % 2 else "what no model writes",
            }
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\ntest_split: test\n"
    )
    asked = {
        "ours": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n',
        "written": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{written}}"\n'
        'target_delimiter: ""\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n',
        "rolled": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
    }
    for name, text in asked.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return tmp_path


def test_the_harness_counts_what_the_model_finds_likeliest(tasks, dataset, model):
    writer = Writer(model, Dataset.open(dataset))
    found = measure_with_harness(task_of(path=str(tasks)), writer)
    assert (found["value"], found["count"]) == (6 / 8, 8)
    assert found["low"] < 6 / 8 < found["high"]
    written = task_of(path=str(tasks), task="written", metric="exact_match")
    assert measure_with_harness(written, writer)["value"] == 4 / 8
    assert measure_with_harness(task_of(path=str(tasks), max_rows=3), writer)["count"] == 3


def test_a_task_or_metric_that_is_not_there_is_refused(tasks, dataset, model):
    writer = Writer(model, Dataset.open(dataset))
    with pytest.raises(Refused, match=r"no share of right answers 'f1'.*one of: acc"):
        measure_with_harness(task_of(path=str(tasks), metric="f1"), writer)
    with pytest.raises(Refused, match="none, this task has no share"):
        measure_with_harness(task_of(path=str(tasks), task="rolled", metric="bits_per_byte"), writer)
    with pytest.raises(Refused, match="cannot run nowhere"):
        measure_with_harness(task_of(path=str(tasks), task="nowhere"), writer)


def test_the_report_has_what_the_harness_found(tasks, dataset, model, tmp_path):
    opened = Dataset.open(dataset)
    export_package(model, opened, tmp_path / "model", provenance={})
    config = EvaluateConfig(tasks=(task_of(path=str(tasks)),), baselines=(), max_tokens=200)
    evaluate(config, model=tmp_path / "model", data=dataset, out=tmp_path / "out", log=Log(rank=1))
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["accuracy"]["ours"]["value"] == 6 / 8
    assert "| ours | 75.0% |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_without_the_library_its_tasks_are_refused(monkeypatch, dataset, model):
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(Refused, match=r"not installed \(tasks\)\. Install it: pip install lm_eval"):
        measure_with_harness(task_of(), Writer(model, Dataset.open(dataset)))
