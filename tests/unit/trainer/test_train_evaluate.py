"""A report says how well a model does and how sure that is; the gate goes by it."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train_sources import CHATS, QUIET, config_of, write_rows

from trainer.config import EvaluateConfig, GateConfig, ModelConfig
from trainer.data import Dataset, make_dataset
from trainer.errors import Refused
from trainer.evaluate import evaluate
from trainer.export import export_package
from trainer.intervals import ratio_of_sums, wilson
from trainer.model import Decoder
from trainer.publish import judge
from trainer.scoring import Writer, judge_continuation, token_nats
from trainer.shapes import weights_digest


def package_of(dataset: Dataset, directory, **more):
    torch.manual_seed(0)
    shape = ModelConfig(layers=1, hidden=32, heads=2, kv_heads=1, ffn=32, max_context=64)
    labels = None if dataset.labels is None else len(dataset.labels)
    model = Decoder(shape, vocab_size=dataset.vocab_size, labels=labels).eval()
    export_package(model, dataset, directory, provenance={}, **more)
    return model


@given(right=st.integers(0, 50), more=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_an_interval_holds_the_share_and_narrows_with_more_questions(right, more):
    count = right + more
    low, high = wilson(right, count)
    assert 0 <= low <= high <= 1
    if count:
        assert low - 1e-9 <= right / count <= high + 1e-9
        lower, higher = wilson(10 * right, 10 * count)
        assert higher - lower < high - low


def test_nineteen_of_twenty_intervals_hold_the_truth():
    random, held = np.random.default_rng(1), [0, 0]
    for _ in range(200):
        right = int((random.random(100) < 0.3).sum())
        low, high = wilson(right, 100)
        held[0] += low <= 0.3 <= high
        values = random.exponential(2.0, 3000)
        low, high = ratio_of_sums(values, np.full(3000, 4.0))
        held[1] += low <= 0.5 <= high
    assert all(180 <= count <= 198 for count in held)


def test_a_continuation_is_as_likely_as_its_tokens(dataset, tmp_path):
    opened = Dataset.open(dataset)
    model = package_of(opened, tmp_path / "model")
    tokens = opened.tokens("heldout").read(0, 30)
    nats = token_nats(model, tokens)
    assert judge_continuation(model, tokens[:20].tolist(), tokens[20:].tolist())[0] == pytest.approx(
        nats[19:].sum(), rel=1e-4
    )
    long = np.tile(tokens, 5)  # more than the context has room for
    assert np.isfinite(judge_continuation(model, long.tolist(), tokens[:10].tolist())[0])


def test_questions_are_measured_with_intervals_and_told_to_the_gate(dataset, tmp_path):
    opened = Dataset.open(dataset)
    model = package_of(opened, tmp_path / "model", shard_bytes=1000)
    tokenizer = opened.tokenizer()
    rows = []
    for n in range(12):  # the answer is what the model itself finds likelier a byte, but for every fourth question
        question, choices = f"value {n} is", [" one", " and some more"]
        prompt = tokenizer.encode(question).ids
        a_byte = [judge_continuation(model, prompt, tokenizer.encode(c).ids)[0] / len(c.encode()) for c in choices]
        rows.append({"question": question, "choices": choices, "answer": int(np.argmin(a_byte)) ^ (n % 4 == 0)})
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exact.jsonl").write_text('{"question": "x", "answer": "no model says this"}\n')
    config = EvaluateConfig.model_validate(
        {
            "max_tokens": 500,
            "baselines": ["unigram"],
            "tasks": [
                {"kind": "multiple_choice", "name": "choices", "path": str(tmp_path / "choices.jsonl")},
                {"kind": "exact_match", "name": "exact", "path": str(tmp_path / "exact.jsonl"), "max_tokens": 4},
            ],
        }
    )
    places = {"model": tmp_path / "model", "data": dataset, "out": tmp_path / "out"}
    evaluate(config, **places, log=QUIET)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["accuracy"]["choices"]["value"] == 9 / 12
    assert report["accuracy"]["exact"]["value"] == 0
    low, high = report["intervals"]["bits_per_byte"]
    assert low < report["bits_per_byte"] < high
    assert report["model_digest"] == weights_digest(tmp_path / "model")
    markdown = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| choices | 75.0% | 46.8% to 91.1% | 12 |" in markdown

    asks = {"must_beat": None}
    assert judge(GateConfig.model_validate({**asks, "min_accuracy": {"choices": 0.75}}), report)[0]
    passed, why = judge(GateConfig.model_validate({**asks, "min_accuracy": {"choices": 0.76}}), report)
    assert (passed, why) == (False, "75.0% of choices right is below the 76.0% wanted")
    assert (
        "no accuracy of others"
        in judge(GateConfig.model_validate({**asks, "min_accuracy": {"others": 0.1}}), report)[1]
    )

    (tmp_path / "exact.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(Refused, match=r"no question \(.*exact.jsonl:1\)"):
        evaluate(config, **places, log=QUIET)


@pytest.mark.parametrize("line", ['{"question": "\\ud800", "answer": "x"}', '{"question": ' + "[" * 100_000])
def test_questions_that_are_no_text_are_refused(dataset, tmp_path, line):
    package_of(Dataset.open(dataset), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    task = {"kind": "exact_match", "name": "rows", "path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(Refused, match="the questions cannot be read"):
        evaluate(
            EvaluateConfig.model_validate({"tasks": [task]}),
            model=tmp_path / "model",
            data=dataset,
            out=tmp_path / "out",
            log=QUIET,
        )


def test_an_empty_question_is_answered_from_the_end_of_the_text_before(dataset, tmp_path):
    opened = Dataset.open(dataset)
    model = package_of(opened, tmp_path / "model")
    ids = opened.tokenizer().encode("def").ids
    writer = Writer(model, opened)
    assert judge_continuation(model, writer.read(""), ids) == judge_continuation(model, [opened.end_of_text], ids)
    assert writer.read("def") == ids


def test_a_writer_stops_at_every_end_that_its_package_has(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    opened = Dataset.open(tmp_path / "data")
    model = package_of(opened, tmp_path / "model")
    context = torch.tensor([opened.tokenizer().encode("def").ids])
    likeliest = int(model(context)[0, -1].argmax())
    assert Writer(model, opened).complete("def", max_tokens=1) != "def"
    (tmp_path / "data" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, likeliest]}))
    assert Writer(model, opened).complete("def", max_tokens=9) == "def"
    assert Writer(model, opened).go_on("def", max_tokens=9) == ""


def test_a_package_without_a_tokenizer_is_refused(dataset, tmp_path):
    package_of(Dataset.open(dataset), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="the model package has no tokenizer"):
        evaluate(EvaluateConfig(), model=tmp_path / "model", data=dataset, out=tmp_path / "out", log=QUIET)


def test_chats_are_judged_by_their_answers(tmp_path):
    source = write_rows(tmp_path / "rows", "jsonl", [{"messages": chat} for chat in CHATS])
    make_dataset(config_of(source, task={"kind": "chat"}), tmp_path / "data", log=QUIET)
    dataset = Dataset.open(tmp_path / "data")
    package_of(dataset, tmp_path / "model")
    config = EvaluateConfig.model_validate({"sample": {"prompt": "Sure?", "max_tokens": 3}})
    evaluate(config, model=tmp_path / "model", data=tmp_path / "data", out=tmp_path / "out", log=QUIET)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["baselines"] == {}
    assert report["tokens"] <= dataset.manifest.splits["heldout"].learnt
    assert 1 < report["bits_per_byte"] < 20
    assert "held-out tokens of answers" in (tmp_path / "out" / "evaluation.md").read_text()


def test_classes_are_judged_by_accuracy(tmp_path):
    rows = [{"text": f"number {n}", "label": n % 2} for n in range(60)]
    source = write_rows(tmp_path / "rows", "jsonl", rows)
    task = {"kind": "classify", "labels": ["even", "odd"]}
    make_dataset(config_of(source, task=task), tmp_path / "data", log=QUIET)
    dataset = Dataset.open(tmp_path / "data")
    package_of(dataset, tmp_path / "model")
    places = {"model": tmp_path / "model", "data": tmp_path / "data", "out": tmp_path / "out"}
    evaluate(EvaluateConfig(), **places, log=QUIET)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = report["accuracy"]["classification"]
    assert found["count"] == len(dataset.examples("heldout"))
    assert found["low"] <= found["value"] <= found["high"]
    assert "classifier has no bits per byte" in judge(GateConfig(), report)[1]
    gate = GateConfig.model_validate({"must_beat": None, "min_accuracy": {"classification": 0.01}})
    assert judge(gate, report)[0] == (found["value"] >= 0.01)
