"""Datasets come out whole and exact; the cursor draws the same global batch whatever the world and the history."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import (
    END_OF_TEXT,
    Cursor,
    DataConfig,
    Dataset,
    TokenStream,
    bytes_of_tokens,
    encode,
    make_dataset,
)
from trainer.errors import Refused
from trainer.log import Log

QUIET = Log(rank=1)


def text_config(path, **more) -> DataConfig:
    return DataConfig.model_validate({"source": {"kind": "text", "path": str(path)}, "vocab_size": 300, **more})


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_every_string_has_tokens_and_comes_back_exactly(dataset, text):
    tokenizer = Dataset.open(dataset).tokenizer()
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert bytes_of_tokens(tokenizer)[ids].sum() == len(text.encode())


def test_the_tokens_of_a_dataset_are_its_documents(dataset, corpus):
    opened = Dataset.open(dataset)
    tokenizer, texts = opened.tokenizer(), []
    for split in ("train", "heldout"):
        stream = opened.tokens(split)
        text = tokenizer.decode(stream.read(0, len(stream)).tolist(), skip_special_tokens=False)
        texts += text.split(END_OF_TEXT)[:-1]
        told = opened.manifest.splits[split].model_dump()
        assert told["tokens"] == len(stream)
        ends = [at for at, token in enumerate(stream.read(0, len(stream))) if token == opened.end_of_text]
        assert len(ends) == told["documents"] > 0
        assert ends[-1] == len(stream) - 1
        assert told["bytes"] == len(text.encode()) - len(ends) * len(END_OF_TEXT)
    # The trainer's own source spells the end of text: it is text there and no end.
    assert END_OF_TEXT in "".join(path.read_text() for path in corpus.iterdir())
    assert sorted("".join(texts)) == sorted(
        "".join(path.read_text().replace(END_OF_TEXT, "") for path in corpus.iterdir())
    )


def test_a_second_run_skips_and_another_config_does_not(corpus, tmp_path, capsys):
    for config in (text_config(corpus), text_config(corpus), text_config(corpus, vocab_size=290)):
        make_dataset(config, tmp_path / "out", log=Log())
    done = [row for row in map(json.loads, capsys.readouterr().out.splitlines()) if row["event"] == "done"]
    assert [row["skipped"] for row in done] == [False, True, False]
    assert Dataset.open(tmp_path / "out").vocab_size == 290


def test_the_same_corpus_gives_the_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        make_dataset(text_config(corpus), tmp_path / name, log=QUIET)
    assert Dataset.open(tmp_path / "a").digest == Dataset.open(tmp_path / "b").digest


def test_one_document_gives_its_end_to_the_held_out_side(tmp_path):
    (tmp_path / "only.txt").write_text("".join(f"line {n}\n" for n in range(500)))
    make_dataset(text_config(tmp_path / "only.txt", held_out=0.2), tmp_path / "out", log=QUIET)
    dataset = Dataset.open(tmp_path / "out")
    stream = dataset.tokens("heldout")
    assert dataset.tokenizer().decode(stream.read(0, len(stream)).tolist()).endswith("line 499\n")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: d.parent.stat(), "does not exist"),
        (lambda d: d.mkdir(), "no file matches"),
        (lambda d: (d.mkdir(), (d / "a.txt").write_text("")), "corpus is empty"),
        (lambda d: (d.mkdir(), (d / "a.txt").write_bytes(b"ok" * 90 + b"\xff")), r"not UTF-8 at byte 180 \(.*a.txt\)"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused_and_leaves_nothing(tmp_path, make, said):
    make(tmp_path / "corpus")
    with pytest.raises(Refused, match=said):
        make_dataset(text_config(tmp_path / "corpus"), tmp_path / "out", log=QUIET)
    assert not list((tmp_path / "out").glob("*"))


def test_a_dataset_that_is_cut_or_changed_is_refused(corpus, tmp_path):
    make_dataset(text_config(corpus), tmp_path / "out", log=QUIET)
    shard = tmp_path / "out" / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(Refused, match=r"absent or cut .*train-00000.bin"):
        Dataset.open(tmp_path / "out")
    shard.write_bytes(content[:-2] + b"\x00\x01")
    with pytest.raises(Refused, match="not the one that the manifest describes"):
        Dataset.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", "many"), ("files", None), ("sources", [{"name": "a", "weight": -1, "splits": {}}]), ("dtype", "O")],
)
def test_a_manifest_with_wrong_values_is_refused_and_made_again(corpus, tmp_path, key, value):
    make_dataset(text_config(corpus), tmp_path / "out", log=QUIET)
    path = tmp_path / "out" / "manifest.json"
    whole = path.read_bytes()
    path.write_text(json.dumps({**json.loads(whole), key: value}))
    with pytest.raises(Refused, match=rf"was changed: {key}.*manifest.json"):
        Dataset.open(tmp_path / "out")
    make_dataset(text_config(corpus), tmp_path / "out", log=QUIET)
    assert path.read_bytes() == whole


def test_shards_read_as_one_stream(dataset, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_TOKENS", 1000)
    config = text_config(corpus, held_out=0.1, seed=1)
    make_dataset(config, tmp_path / "many", log=QUIET)
    many, one = Dataset.open(tmp_path / "many").tokens("train"), Dataset.open(dataset).tokens("train")
    assert len(list((tmp_path / "many").glob("train-*.bin"))) == -(-len(one) // 1000)
    assert np.array_equal(many.read(0, len(many)), one.read(0, len(one)))
    assert np.array_equal(many.read(990, 1030), one.read(990, 1030))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    path = tmp_path_factory.mktemp("stream") / "train-00000.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    return TokenStream([path], dtype=np.dtype("<u2"))


@given(
    step=st.integers(0, 400), seed=st.integers(0, 3), world=st.sampled_from([1, 2, 3, 6]), micro=st.sampled_from([1, 2])
)
@settings(max_examples=100, deadline=None)
def test_the_global_batch_is_the_same_at_any_world_size(stream, step, seed, world, micro):
    def global_batch(world: int, micro_batch: int) -> np.ndarray:
        cursor = Cursor.over(stream, seq=10, global_batch=12, seed=seed)
        shares = [
            cursor.batch(step, micro=index, micro_batch=micro_batch, rank=rank, world=world).tokens_BL
            for index in range(12 // (world * micro_batch))
            for rank in range(world)
        ]
        return np.concatenate(shares)

    assert np.array_equal(global_batch(world, micro), global_batch(1, 12))


@given(seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_an_epoch_sees_every_window_once(stream, seed):
    cursor = Cursor.over(stream, seq=10, global_batch=11, seed=seed)  # 99 windows: nine whole steps
    for epoch in range(2):
        starts = np.concatenate(
            [[window for _, window in cursor.samples(step)] for step in range(9 * epoch, 9 * epoch + 9)]
        )
        assert np.array_equal(np.sort(starts) - starts.min(), np.arange(99) * 10)
        assert starts.max() + 11 <= len(stream)


def test_too_few_tokens_for_one_window_are_refused(stream):
    with pytest.raises(Refused, match="too few for seq 1000"):
        Cursor.over(stream, seq=1000, global_batch=1, seed=0)
