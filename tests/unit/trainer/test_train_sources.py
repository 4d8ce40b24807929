"""Rows come out of every kind of file once, however it is cut; mixtures keep their weights; examples stay whole."""

import bz2
import gzip
import json
import lzma
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs_of_trainer import run_program

from trainer.data import END_OF_TEXT, Cursor, DataConfig, Dataset, make, make_dataset, sources
from trainer.data.chat import ChatTemplate
from trainer.data.encode import NOTHING
from trainer.data.sources import Reader
from trainer.data.windows import pack
from trainer.errors import Refused
from trainer.log import Log

QUIET = Log(rank=1)
TEXTS = [f"document {n} tells of the number {n * n} and then ends é" for n in range(60)]


def write_rows(directory, kind: str, rows: list[dict]) -> dict:
    """The rows as files of a kind, in three files; returns the source."""
    directory.mkdir()
    if kind == "datasets":
        with pa.OSFile(str(directory / "data-0.arrow"), "wb") as file:
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=7)
        (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    for number in range(3) if kind != "datasets" else ():
        some = rows[number::3]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(some), directory / f"{number}.parquet", row_group_size=4)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some).encode()
            packed = gzip.compress(lines) if kind == "jsonl.gz" else lines
            (directory / f"{number}.{kind}").write_bytes(packed)
    source = {"kind": kind.split(".")[0], "path": str(directory)}
    return source | ({"glob": "*.jsonl.gz"} if kind == "jsonl.gz" else {})


def config_of(source: dict, **more) -> DataConfig:
    return DataConfig.model_validate({"source": source, "vocab_size": 300, "held_out": 0.2, **more})


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "datasets"])
def test_every_row_is_read_once_however_the_files_are_cut(tmp_path, monkeypatch, kind):
    source = config_of(write_rows(tmp_path / "rows", kind, [{"text": text, "n": 1} for text in TEXTS])).parts[0].source
    for size in (1, 100, 1000, 1 << 20):
        monkeypatch.setattr(sources, "PART_BYTES", size)
        reader = Reader(source)
        rows = [row for part in reader.parts() for row in reader.rows(part)]
        assert sorted(row.fields["text"] for row in rows) == sorted(TEXTS)
        assert len({row.name for row in rows}) == len(rows)


def test_processes_give_the_same_dataset_as_one(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "rows", "jsonl", [{"text": text} for text in TEXTS])
    make_dataset(config_of(source), tmp_path / "one", log=QUIET)
    monkeypatch.setattr(make, "_ALONE_BYTES", 0)  # a part a file: a process each
    make_dataset(config_of(source), tmp_path / "many", log=QUIET)
    package = tmp_path / "package"  # with its tokenizer no process reads the rows before the others do
    package.mkdir()
    (package / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": 0}))
    (package / "tokenizer.json").write_bytes((tmp_path / "one" / "tokenizer.json").read_bytes())
    (tmp_path / "rows" / "1.jsonl").write_text("nonsense\n")
    with pytest.raises(Refused, match="not JSON"):
        make_dataset(config_of(source), tmp_path / "refused", log=QUIET, base=package)
    many, one = Dataset.open(tmp_path / "many"), Dataset.open(tmp_path / "one")
    assert many.digest == one.digest
    for split in ("train", "heldout"):
        stream = many.tokens(split)
        texts = many.tokenizer().decode(stream.read(0, len(stream)).tolist(), skip_special_tokens=False)
        assert set(texts.split(END_OF_TEXT)) - {""} <= set(TEXTS)
    assert sum(many.manifest.splits[split].documents for split in ("train", "heldout")) == len(TEXTS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 1}', "field 'text' holds int"),
        ('{"body": "x"}', "no field 'text'.*Name one of its fields in task: body"),
        ("nonsense", r"not JSON.*\(.*rows.jsonl, byte 0\)"),
        ("[1]", "no JSON object"),
        ('{"text": "\\ud800"}', "not JSON: 'utf-8' codec can't encode.*surrogates"),
        ('{"text": ' + "[" * 100_000, "not JSON: maximum recursion depth"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_text(f"{line}\n" + json.dumps({"text": "x" * 200}) + "\n")
    with pytest.raises(Refused, match=said):
        make_dataset(config_of({"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}), tmp_path / "out", log=QUIET)
    assert not list((tmp_path / "out").glob("*"))


def test_packed_files_are_read_whole_and_damaged_ones_are_refused(tmp_path):
    half = len(TEXTS) // 2
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    frames = [pa.compress(b"".join(some), "zstd", asbytes=True) for some in (lines[:half], lines[half:])]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    reader = Reader(config_of({"kind": "jsonl", "path": str(tmp_path / "rows.jsonl.zst")}).parts[0].source)
    assert [row.fields["text"] for part in reader.parts() for row in reader.rows(part)] == TEXTS
    packed = b"".join(lines)
    damaged = {"gz": gzip.compress(packed), "bz2": bz2.compress(packed), "xz": lzma.compress(packed), "zst": frames[0]}
    for ending, content in damaged.items():
        path = tmp_path / f"damaged.jsonl.{ending}"
        for bad in (content[:-9], content[:40] + bytes(9) + content[49:], packed):
            path.write_bytes(bad)
            reader = Reader(config_of({"kind": "jsonl", "path": str(path)}).parts[0].source)
            with pytest.raises(Refused, match=rf"cannot be read.*\({path}\)"):
                list(reader.rows(reader.parts()[0]))


def test_columns_that_no_task_names_are_not_read(tmp_path):
    rows = pa.Table.from_pylist([{"text": text} for text in TEXTS])
    no_date = pa.array([10**9] * len(TEXTS), pa.int32()).cast(pa.date32())  # after the last that Python knows
    pq.write_table(rows.append_column("at", no_date), tmp_path / "rows.parquet")
    source = config_of({"kind": "parquet", "path": str(tmp_path)}).parts[0].source
    reader = Reader(source, ("text",))
    assert [row.fields for part in reader.parts() for row in reader.rows(part)] == rows.to_pylist()
    with pytest.raises(Refused, match=r"cannot be read: days=.*rows.parquet"):
        list(Reader(source, ("text", "label")).rows(reader.parts()[0]))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{}", "damaged"),
        ("{", "damaged"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}', "flatten_indices"),
    ],
)
def test_what_is_no_whole_split_is_refused(tmp_path, state, said):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(Refused, match=said):
        Reader(config_of({"kind": "datasets", "path": str(tmp_path)}).parts[0].source).parts()


def test_configs_that_contradict_themselves_are_refused_with_their_line(tmp_path):
    (tmp_path / "data.yaml").write_text("task: {kind: chat}\nsource:\n  kind: text\n  path: x\n")
    ended = run_program("trainer.data", "--config", tmp_path / "data.yaml", f"out={tmp_path / 'out'}")
    assert ended.returncode == 2
    assert "task chat needs rows with fields, and source text has none" in ended.stderr
    (tmp_path / "data.yaml").write_text("mixture:\n- name: a\n  weight: 1\n  source: {kind: text, pth: x}\n")
    ended = run_program("trainer.data", "--config", tmp_path / "data.yaml", f"out={tmp_path / 'out'}")
    assert "unknown key 'mixture.0.source.pth'" in ended.stderr
    assert "data.yaml:4). Did you mean 'path'?" in ended.stderr


# Mixtures


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Dataset:
    directory = tmp_path_factory.mktemp("mixed")
    parts = []
    for name, weight, letter in (("many", 3, "a"), ("few", 1, "b")):
        rows = [{"text": f"{letter * 40} {n}"} for n in range(50)]
        parts.append({"name": name, "weight": weight, "source": write_rows(directory / name, "jsonl", rows)})
    config = DataConfig.model_validate({"mixture": parts, "vocab_size": 270, "held_out": 0.1})
    make_dataset(config, directory / "out", log=QUIET)
    return Dataset.open(directory / "out")


@given(first=st.integers(0, 300), steps=st.integers(1, 40), micro=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_a_mixture_is_exact_at_any_world_size_and_from_any_step(mixed, first, steps, micro):
    straight = Cursor.of(mixed, seq=16, global_batch=8, seed=3)
    [straight.samples(step) for step in range(first)]  # one that has come all the way
    fresh = Cursor.of(mixed, seq=16, global_batch=8, seed=3)
    for step in range(first, first + steps):
        world = (1, 2, 4)[step % 3]
        shares = []
        for index in range(8 // (min(micro, 8 // world) * world)):
            for rank in range(world):
                batch = fresh.batch(step, micro=index, micro_batch=min(micro, 8 // world), rank=rank, world=world)
                shares.append(batch.tokens_BL)
        whole = straight.batch(step, micro=0, micro_batch=8, rank=0, world=1).tokens_BL
        assert np.array_equal(np.concatenate(shares), whole)


def test_the_weights_hold_in_every_block_and_no_window_comes_twice_in_an_epoch(mixed):
    cursor = Cursor.of(mixed, seq=16, global_batch=8, seed=0)
    drawn = [sample for step in range(2 * 1024 // 8) for sample in cursor.samples(step)]
    for block in (drawn[:1024], drawn[1024:]):
        assert Counter(source for source, _ in block) == {0: 768, 1: 256}
    for source, windows in ((number, len(each.windows)) for number, each in enumerate(cursor._sources)):
        own = [window for drawn_from, window in drawn if drawn_from == source]
        for at in range(0, len(own) - windows, windows):
            assert len(set(own[at : at + windows])) == windows


def test_a_source_that_is_shorter_than_a_sequence_is_named(mixed):
    with pytest.raises(Refused, match=r"training tokens of many are too few for seq 100000"):
        Cursor.of(mixed, seq=100_000, global_batch=4, seed=1)


def test_a_masked_window_numbers_its_documents(mixed):
    cursor = Cursor.of(mixed, seq=64, global_batch=1, seed=0, document_mask=True)
    batch = cursor.batch(0, micro=0, micro_batch=1, rank=0, world=1)
    assert batch.documents_BL is not None
    tokens, documents = batch.tokens_BL[0], batch.documents_BL[0]
    ends = np.flatnonzero(tokens[:-1] == mixed.end_of_text)
    assert len(ends)
    assert np.array_equal(np.flatnonzero(np.diff(documents)), ends)


# Examples


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_packing_loses_nothing_and_overfills_nothing(lengths):
    sizes = np.array(lengths)
    rows = pack(sizes, np.arange(len(sizes)), room=20)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    assert max(sizes[row].sum() for row in rows) <= 20
    assert len(rows) <= 2 * -(-sizes.sum() // 20)  # no two rows that would fit in one


CHATS = [
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"What is {n} + {n}?"},
        {"role": "assistant", "content": f"It is {2 * n}."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    for n in range(40)
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Dataset:
    directory = tmp_path_factory.mktemp("chats")
    source = write_rows(directory / "rows", "jsonl", [{"messages": chat} for chat in CHATS])
    make_dataset(config_of(source, task={"kind": "chat"}), directory / "out", log=QUIET)
    return Dataset.open(directory / "out")


def test_only_answers_are_learnt(chats):
    tokenizer, examples = chats.tokenizer(), chats.examples("train")
    for number in range(len(examples)):
        tokens, targets = examples.read(number, 0, int(examples.lengths()[number]))
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        answers = tokenizer.decode(targets[targets != NOTHING].tolist(), skip_special_tokens=False)
        first = text.split("<|im_start|>assistant\n")[1].split("\n")[0]
        assert answers == f"{first}Yes.<|im_end|>"
        assert first.endswith("<|im_end|>")
        learnt = np.flatnonzero(targets != NOTHING)
        assert np.array_equal(targets[learnt], tokens[learnt + 1])


def test_chats_are_tokenised_and_masked_as_transformers_does(chats, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(chats.directory / "tokenizer.json"))
    marked = (chats.directory / "chat_template.jinja").read_text()
    spoken = "message['content'] + '<|im_end|>\\n' }}"
    assert spoken in marked
    marked = marked.replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' + " + spoken,
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}",
    )
    want = theirs.apply_chat_template(
        CHATS, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    by_tokens = {tuple(ids): mask for ids, mask in zip(want["input_ids"], want["assistant_masks"], strict=True)}
    for split in ("train", "heldout"):
        examples = chats.examples(split)
        for number in range(len(examples)):
            tokens, targets = examples.read(number, 0, int(examples.lengths()[number]))
            mask = by_tokens.pop(tuple(tokens.tolist()))
            assert np.array_equal(targets[:-1] != NOTHING, np.array(mask[1:], dtype=bool))
    assert not by_tokens
    ours = ChatTemplate(marked, bos="", eos="")
    assert ours.render(CHATS[0]) == theirs.apply_chat_template(CHATS[0], chat_template=marked, tokenize=False)


TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c' é", "parameters": {}}}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])  # Arrow gives every message the fields of all, as nulls
def test_tools_and_their_calls_are_told_as_transformers_does(chats, tmp_path, kind):
    from transformers import PreTrainedTokenizerFast

    chat = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "1 < 2"}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    told = [{"messages": chat, "tools": json.dumps(TOOLS) if kind == "parquet" else TOOLS} for _ in range(6)]
    source = config_of(write_rows(tmp_path / "rows", kind, told), task={"kind": "chat"}).parts[0].source
    reader = Reader(source, ("messages",))
    rows = [row for part in reader.parts() for row in reader.rows(part)]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(chats.directory / "tokenizer.json"))
    want = theirs.apply_chat_template(chat, tools=TOOLS, chat_template=TOOLS_TEMPLATE, tokenize=False)
    ours = ChatTemplate(TOOLS_TEMPLATE, bos="", eos="")
    for row in rows:
        text, answers = ours.with_answers(row.fields["messages"], tools=row.fields["tools"], where=row.name)
        assert text == want
        assert [text[begin:end] for begin, end in answers] == ['{"name": "add", "arguments": "1 < 2"}', "It is 3."]


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ range(10 ** 9) }}"])
def test_a_template_that_fails_is_told_with_the_row(template):
    with pytest.raises(Refused, match=r"the chat template refuses a chat: .*\(row 7\)"):
        ChatTemplate(template, bos="", eos="").with_answers(CHATS[0], where="row 7")


def test_a_thought_that_a_template_drops_later_is_not_learnt_there():
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('|')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "thought|b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "thought|d"},
    ]
    text, answers = ChatTemplate(forgetful, bos="", eos="").with_answers(chat, where="row")
    assert [text[begin:end] for begin, end in answers] == ["thought|d"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no list of messages"),
        ([{"role": "user"}], "no text in 'content'"),
        ([{"role": "boss", "content": "x"}], "role 'boss'"),
    ],
)
def test_what_is_no_chat_is_refused(messages, said):
    with pytest.raises(Refused, match=said):
        ChatTemplate("x", bos="", eos="").with_answers(messages, where="row")


def test_long_examples_are_cut_and_counted(chats):
    cursor = Cursor.of(chats, seq=40, global_batch=1, seed=0)
    lengths = chats.examples("train").lengths()
    assert cursor.shortened == (lengths > 40).sum() > 0
    assert cursor.left_out <= cursor.shortened
    batch = cursor.batch(0, micro=0, micro_batch=1, rank=0, world=1)
    assert (batch.targets_BL != NOTHING).any()


def test_packed_rows_hold_every_example_once_an_epoch(chats):
    cursor = Cursor.of(chats, seq=160, global_batch=1, seed=0)
    rows = len(cursor._sources[0].windows)
    seen = Counter()
    for step in range(rows):
        batch = cursor.batch(step, micro=0, micro_batch=1, rank=0, world=1)
        assert batch.documents_BL is not None
        for document in set(batch.documents_BL[0].tolist()) - {-1}:
            seen[tuple(batch.tokens_BL[0][batch.documents_BL[0] == document].tolist())] += 1
    assert sum(seen.values()) == len(chats.examples("train"))
    assert set(seen.values()) == {1}


def test_classes_are_the_targets_of_the_ends(tmp_path):
    rows = [{"text": f"number {n} here", "label": ["even", "odd"][n % 2]} for n in range(50)]
    source = write_rows(tmp_path / "rows", "jsonl", rows)
    task = {"kind": "classify", "labels": ["even", "odd"]}
    make_dataset(config_of(source, task=task), tmp_path / "out", log=QUIET)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.labels == ["even", "odd"]
    examples = dataset.examples("train")
    for number in range(len(examples)):
        tokens, targets = examples.read(number, 0, int(examples.lengths()[number]))
        told = int(dataset.tokenizer().decode(tokens[:-1].tolist()).split()[1])
        assert targets.tolist() == [NOTHING] * (len(tokens) - 1) + [told % 2]
        assert tokens[-1] == dataset.end_of_text
    with pytest.raises(Refused, match="label 'odd' is none of even, prime"):
        make_dataset(config_of(source, task={**task, "labels": ["even", "prime"]}), tmp_path / "other", log=QUIET)
