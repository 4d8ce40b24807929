"""Batches: every line answered exactly once and in order, also by servers that are killed at any moment."""

import json
import random
from pathlib import Path

import httpx
import openai
import pytest
from conftest import Server

from serving.batches import LINE_LIMIT_BYTES, MOST_LINES

LINES = 40


def request(n: int, **changes: object) -> dict:
    body = {"model": "tiny", "prompt": f"line {n}", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    return {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body, **changes}


def jsonl(lines: list[dict | str]) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60)


def finished(client: openai.OpenAI, server: Server, batch_id: str):
    server.wait_until(
        lambda: client.batches.retrieve(batch_id).status in ("completed", "failed", "cancelled"), "the batch"
    )
    return client.batches.retrieve(batch_id)


def answers(client: openai.OpenAI, file_id: str | None) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file_id or "").text.splitlines()]


def test_every_line_is_answered_once_and_in_order_after_kills(tiny: Path, tmp_path: Path, start_server) -> None:
    flags = ("--files-dir", str(tmp_path / "files"), "--max-num-seqs", "8")
    server = start_server(tiny, *flags)
    with client_of(server) as client:
        file = client.files.create(file=("in.jsonl", jsonl([request(n) for n in range(LINES)])), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    chance = random.Random(7)
    (tmp_path / "files").mkdir(exist_ok=True)
    journal = tmp_path / "files" / f"{batch.id}.journal"
    for share in (0.2, 0.6):  # killed when about so much is answered, and with a line cut in the middle
        server.wait_until(
            lambda share=share: journal.exists() and journal.read_bytes().count(b"\n") >= share * LINES, "some answers"
        )
        server.process.kill()
        server.process.wait()
        with open(journal, "ab") as torn:
            torn.write(b'{"line": 39, "ok": true, "answer": {"cus'[: chance.randint(1, 39)])
        server = start_server(tiny, *flags)
    with client_of(server) as client:
        done = finished(client, server, batch.id)
        assert done.status == "completed"
        assert done.error_file_id is None
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.total) == (LINES, LINES)
        found = answers(client, done.output_file_id)
        assert [answer["custom_id"] for answer in found] == [f"id-{n}" for n in range(LINES)]
        assert {answer["response"]["status_code"] for answer in found} == {200}
        assert not journal.exists()


@pytest.fixture(scope="module")
def server(tiny: Path, start_server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return start_server(tiny, "--files-dir", str(tmp_path_factory.mktemp("files"))).wait_ready()


def test_bad_lines_are_answered_with_what_is_wrong(server: Server) -> None:
    bad = [
        request(1), "no json", "[]", request(2, url="/v1/embeddings"), request(1), request(3, body={"model": "other", "prompt": "x"}),
        request(4, body={**request(4)["body"], "stream": True}), {"custom_id": "id-5"}, "", request(6),
    ]  # fmt: skip
    with client_of(server) as client:
        file = client.files.create(file=("in.jsonl", jsonl(bad)), purpose="batch")
        assert client.files.retrieve(file.id).bytes == len(jsonl(bad))
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        done = finished(client, server, batch.id)
        assert [a["custom_id"] for a in answers(client, done.output_file_id)] == ["id-1", "id-6"]
        errors = answers(client, done.error_file_id)
        assert [a["custom_id"] for a in errors] == [None, None, "id-2", "id-1", "id-3", "id-4", "id-5"]
        assert all((a["error"] is None) != (a["response"] is None) for a in errors)
        assert [a["response"]["status_code"] for a in errors if a["response"]] == [404, 400]
        whole = client.completions.create(
            model="tiny", prompt="line 1", max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
        )
        made = answers(client, done.output_file_id)[0]["response"]["body"]
        assert made["choices"][0]["text"] == whole.choices[0].text
        assert [b.id for b in client.batches.list()] == [batch.id]
        client.files.delete(file.id)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_a_batch_is_cancelled_and_keeps_what_was_answered(server: Server) -> None:
    with client_of(server) as client:
        file = client.files.create(file=("in.jsonl", jsonl([request(n) for n in range(40)])), purpose="batch")
        engine = server.engine()
        engine.suspend()  # so that nothing is answered before the cancellation
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        server.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", "the batch to begin")
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = finished(client, server, batch.id)
        engine.resume()
        assert (done.status, done.output_file_id) == ("cancelled", None)
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)


def test_lists_come_in_pages_and_by_purpose(server: Server) -> None:
    with client_of(server) as client:
        files = [client.files.create(file=(f"{n}", b"{}"), purpose="batch").id for n in range(5)]
        everything = [file.id for file in client.files.list()]
        assert set(files) <= set(everything)
        first = client.files.list(limit=2)
        assert ([file.id for file in first.data], first.has_more) == (everything[:2], True)
        assert [file.id for file in first] == everything  # the client turns the pages
        assert [file.id for file in client.files.list(order="asc", limit=3)] == everything[::-1]
        assert [file.id for file in client.files.list(after=everything[-2])] == everything[-1:]
        assert list(client.files.list(purpose="fine-tune")) == []
        empty = client.files.create(file=("empty", b" \n"), purpose="batch")
        batches = [
            client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h").id
            for file_id in (empty.id, *files)
        ]
        found = [batch.id for batch in client.batches.list(limit=2)]
        assert set(batches) <= set(found)
        assert len(set(found)) == len(found)
        failed = finished(client, server, batches[0])
        assert failed.status == "failed"
        assert failed.errors is not None
        assert "has no lines" in (failed.errors.data or [])[0].message
        for wrong in ({"limit": 0}, {"limit": "x"}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError):
                client.files.list(extra_query=wrong)
        with pytest.raises(openai.NotFoundError):
            client.files.list(after="file-none")


def test_batches_are_bounded_by_lines_and_each_line_by_its_bytes(server: Server) -> None:
    long = b"[" + b"1," * (LINE_LIMIT_BYTES // 2) + b"1]\n"
    with client_of(server) as client:
        for text, status, says in ((long, "completed", "longer than"), (b"{}\n" * (MOST_LINES + 1), "failed", "50000")):
            file = client.files.create(file=("in.jsonl", text), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            done = finished(client, server, batch.id)
            assert done.status == status
            told = (
                done.errors.data[0].message
                if done.errors
                else answers(client, done.error_file_id)[0]["error"]["message"]
            )
            assert says in told


def test_uploads_are_held_to_their_form(server: Server) -> None:
    def upload(**parts) -> httpx.Response:
        return httpx.post(server.url + "/v1/files", timeout=30, **parts)

    file = {"file": ("in.jsonl", b"{}\n")}
    assert upload(files=file, data={"purpose": "assistants"}).status_code == 400
    assert upload(data={"purpose": "batch"}).status_code == 400
    late = upload(files=file, data={"purpose": "batch", "expires_after[seconds]": "60"})
    assert (late.status_code, late.json()["error"]["param"]) == (400, "expires_after[seconds]")
    assert upload(json={}).status_code == 400
    assert (
        upload(content=b"--x\r\nbroken", headers={"content-type": "multipart/form-data; boundary=x"}).status_code == 400
    )
    assert httpx.get(server.url + "/v1/files/file-..%2f..%2fetc").status_code == 404
    assert httpx.get(server.url + "/v1/batches/.lock").status_code == 404
    assert server.events("error") == []
