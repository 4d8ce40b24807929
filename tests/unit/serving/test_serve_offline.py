"""Batches without a server: every line is answered exactly once and in order, by any number of shards, killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_packages import point, publish

from serving import offline
from serving.shards import Input, Output, fingerprint

LINES = 60
FLAGS = ("--max-num-seqs", "8", "--endpoint", "/v1/completions", "--window", "4")


def request(n: int, **changes: object) -> str:
    body = {"model": "tiny", "prompt": f"line {n}", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    return json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body, **changes})


def start(*words: str | Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "serving.offline", *map(str, words), *FLAGS]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)


def answers(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_kills_at_random_moments_leave_one_answer_for_each_line(tiny: Path, tmp_path: Path) -> None:
    """Two shards of two files, each killed with -9 again and again and once by a signal; a channel that moves meanwhile."""
    registry, output, log = tmp_path / "registry", tmp_path / "output", tmp_path / "log.jsonl"
    channel = point(registry, publish(tiny, registry))
    (tmp_path / "input").mkdir()
    lines = [request(n) for n in range(LINES)]
    (tmp_path / "input" / "a.jsonl").write_text("\n".join(lines[:25]) + "\n\n")
    (tmp_path / "input" / "b.jsonl").write_text("\n".join(lines[25:]))
    words = (channel, "--input", tmp_path / "input", "--output", output, "--shards", "2", "--served-name", "tiny")
    chance, killed = random.Random(11), 0
    for shard, numbers in ((0, (signal.SIGKILL, signal.SIGKILL, None)), (1, (signal.SIGTERM, None))):
        for number in numbers:
            process = start(*words, "--shard", str(shard), log=log)
            # Killed when this try has made some windows, at whatever moment of the next ones.
            if number is not None and wait_for_more(output, windows(output), process):
                time.sleep(chance.uniform(0, 0.03))
                process.send_signal(number)
            code = process.wait(timeout=90)
            killed += code in (-9, 75)
            assert code in (0, -9, 75), log.read_text()[-4000:]
            assert number is not None or code == 0
        point(registry, "f" * 64)
    assert killed
    found = answers(output)
    assert [answer["custom_id"] for answer in found] == [f"id-{n}" for n in range(LINES)]
    assert {answer["response"]["status_code"] for answer in found} == {200}
    assert len({answer["id"] for answer in found}) == LINES
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["lines"], summary["failed"], summary["shards"]) == (LINES, 0, 2)
    assert sorted(path.name for path in output.iterdir()) == ["answers.jsonl", "summary.json"]


def windows(output: Path) -> int:
    return len(list(output.glob("work-*/shard-*/*.jsonl")))


def wait_for_more(output: Path, made: int, process: "subprocess.Popen[bytes]") -> bool:
    """Returns whether `process` made a window; False when it ended first."""
    end_s = time.monotonic() + 90
    while windows(output) <= made:
        assert time.monotonic() < end_s
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def test_bad_lines_are_answered_with_what_is_wrong_and_a_second_run_does_nothing(tiny: Path, tmp_path: Path) -> None:
    wrong_model = request(2, body={"model": "other", "prompt": "x"})
    (tmp_path / "in.jsonl").write_text(
        "\n".join([request(0), "no json", wrong_model, request(3, url="/v1/embeddings")])
    )
    words = (tiny, "--input", tmp_path / "in.jsonl", "--output", f"file://{tmp_path / 'out'}")
    log = tmp_path / "log.jsonl"
    assert start(*words, log=log).wait(timeout=90) == 0, log.read_text()
    found = answers(tmp_path / "out")
    assert [answer["custom_id"] for answer in found] == ["id-0", None, "id-2", "id-3"]
    assert [a["response"] and a["response"]["status_code"] for a in found] == [200, None, 404, None]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"] == 3
    before = (tmp_path / "out" / "answers.jsonl").stat().st_mtime_ns
    assert start(*words, log=log).wait(timeout=90) == 0
    assert (tmp_path / "out" / "answers.jsonl").stat().st_mtime_ns == before
    assert json.loads(log.read_text().splitlines()[-1])["skipped"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--input", "nowhere.jsonl", "--output", "out"), "there is no such input"),
        (("--input", __file__, "--output", "out", "--shards", "2", "--shard", "2"), "there is no shard 2 of 2"),
        (("--input", "xyz://a", "--output", "out"), "error: "),
        (("--input", __file__, "--output", "out", "--windw", "3"), "unknown argument '--windw'"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert offline.main([str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


TEXTS = st.lists(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12), max_size=9),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(files=TEXTS, shards=st.integers(1, 7), ends=st.booleans())
def test_every_line_is_of_exactly_one_shard_and_in_order(files: list[list[str]], shards: int, ends: bool) -> None:
    """Whatever the lines hold, however the shards cut them, with a newline at a file's end or without."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    wanted: list[bytes] = []
    for number, lines in enumerate(files):
        encoded = [line.encode() for line in lines]
        fs.pipe_file(f"/in/{number}.jsonl", b"\n".join(encoded) + (b"\n" if ends and encoded else b""))
        wanted += [line for line in encoded if line.strip()]
    source = Input("memory://in")
    found = [line for shard in range(shards) for line in source.lines(shard, shards)]
    assert [line.raw.rstrip(b"\n") for line in found] == wanted
    assert sorted({line.offset for line in found}) == [line.offset for line in found]


def test_an_object_store_shows_whole_files_and_joins_them_in_order() -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    output = Output("memory://out", work="abc")
    answer = {"response": {"status_code": 200}}
    for shard, offset in ((1, 90), (0, 40), (0, 0)):
        output.put_window(shard, offset, [answer | {"custom_id": offset}])
    assert list(output.windows(0)) == [0, 40]
    output.finish_shard(0)
    assert not output.finish(2, about={"work": "abc"})
    assert output.summary() is None
    output.finish_shard(1)
    assert output.finish(2, about={"work": "abc"})
    joined = [json.loads(line)["custom_id"] for line in fs.cat_file("/out/answers.jsonl").splitlines()]
    assert joined == [0, 40, 90]
    assert output.summary() == {"work": "abc", "lines": 3, "failed": 0}
    output.clear()
    assert sorted(fs.find("/out")) == ["/out/answers.jsonl", "/out/summary.json"]


def test_what_was_pinned_first_stays() -> None:
    fsspec.filesystem("memory").store.clear()
    output = Output("memory://out", work="abc")
    assert output.pin("model", {"digest": "a"}) == {"digest": "a"}
    assert output.pin("model", {"digest": "b"}) == {"digest": "a"}


def test_another_question_is_other_work(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("1\n")

    def work(shards: int = 2) -> str:
        source = Input(str(tmp_path / "in.jsonl"))
        return fingerprint(source, endpoint="/v1/completions", model="m", shards=shards, window=4)

    first = work()
    assert work() == first
    assert work(shards=3) != first
    (tmp_path / "in.jsonl").write_text("1\n2\n")
    assert work() != first
