"""The API, spoken to by OpenAI's own client and by hostile ones, over a real server process."""

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from conftest import Server

GREEDY = {"model": "tiny", "temperature": 0.0, "extra_body": {"ignore_eos": True}}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tiny: Path, start_server) -> Server:
    return start_server(tiny, "--max-num-seqs", "8", "--max-queued-tokens", "400").wait_ready()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def post(server: Server, path: str, body: dict | bytes) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, timeout=60, headers={"content-type": "application/json"})


def counted(usage) -> dict:
    """Usage without what the cache of prefixes had: the second of two like requests finds the first one's prompt."""
    return usage.model_dump(exclude={"prompt_tokens_details"})


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("another/model")
    assert error.value.code == "model_not_found"


def test_a_stream_joins_to_the_whole_answer_and_usage_is_exact(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="def main", max_tokens=40, **GREEDY)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 40
    chunks = list(
        client.completions.create(
            prompt="def main", max_tokens=40, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text
    assert chunks[-1].choices == []
    assert counted(chunks[-1].usage) == counted(whole.usage)
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


def test_prompts_may_be_text_tokens_or_lists_of_either(client: openai.OpenAI) -> None:
    def texts(prompt) -> list[str]:
        made = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
        assert [choice.index for choice in made.choices] == list(range(len(made.choices)))
        return [choice.text for choice in made.choices]

    assert texts([5, 6, 7]) == texts([[5, 6, 7]])
    assert texts(["def", "import"]) == texts("def") + texts("import")
    assert texts([[5, 6, 7], [9]]) == texts([5, 6, 7]) + texts([9])


def test_echo_and_logprobs_cover_prompt_and_answer(client: openai.OpenAI) -> None:
    made = client.completions.create(prompt="The quick", max_tokens=5, echo=True, logprobs=2, **GREEDY)
    choice = made.choices[0]
    assert choice.text.startswith("The quick")
    assert made.usage is not None
    assert choice.logprobs is not None
    lp = choice.logprobs
    assert lp.tokens is not None
    assert lp.token_logprobs is not None
    assert lp.text_offset is not None
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.text_offset) == made.usage.total_tokens
    assert lp.token_logprobs[0] is None
    assert all(value <= 0 for value in lp.token_logprobs[1:])
    for token, offset in zip(lp.tokens, lp.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    streamed = list(
        client.completions.create(prompt="The quick", max_tokens=5, echo=True, logprobs=2, stream=True, **GREEDY)
    )
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    assert [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens or ()] == lp.tokens
    scored = client.completions.create(prompt="The quick", max_tokens=0, echo=True, logprobs=0, **GREEDY).choices[0]
    assert scored.text == "The quick"
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == lp.token_logprobs[: made.usage.prompt_tokens]


def test_n_choices_differ_by_seed_and_repeat_with_it(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        made = client.completions.create(model="tiny", prompt="x", n=4, seed=seed, max_tokens=12)
        assert made.usage is not None
        return [choice.text for choice in made.choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 4


def test_stop_strings_cut_streams_and_wholes_alike(client: openai.OpenAI) -> None:
    text = client.completions.create(prompt="def main", max_tokens=40, **GREEDY).choices[0].text
    stop = text[10:14]
    whole = client.completions.create(prompt="def main", max_tokens=40, stop=stop, **GREEDY)
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens < 40
    stream = client.completions.create(prompt="def main", max_tokens=40, stop=[stop], stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_the_best_are_chosen_with_their_logprobs(client: openai.OpenAI) -> None:
    """Of four candidates the two that are likeliest by the token, best first: the same that all four would show."""

    def choices(n: int, best_of: int | None) -> list[tuple[str, list[float]]]:
        made = client.completions.create(
            model="tiny", prompt="x", n=n, best_of=best_of, logprobs=1, seed=3, max_tokens=9,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert made.usage is not None
        assert made.usage.completion_tokens == 4 * 9
        assert [choice.index for choice in made.choices] == list(range(n))
        found = [(choice.text, (choice.logprobs and choice.logprobs.token_logprobs) or []) for choice in made.choices]
        assert all(len(logprobs) == 9 for _, logprobs in found)
        return found

    assert choices(2, 4) == sorted(choices(4, None), key=lambda choice: -sum(choice[1]))[:2]


def test_stop_strings_across_tokens_end_each_of_several_streams_at_its_own(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": ["x", "def"], "n": 3, "seed": 5, "max_tokens": 40}
    ask |= {"extra_body": {"ignore_eos": True}}
    free = [choice.text for choice in client.completions.create(**ask).choices]
    stop = [free[0][9:12], free[4][20:23]]
    expected = [text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))] for text in free]
    assert expected[0] != free[0] != expected[1]
    whole = client.completions.create(**ask, stop=stop)
    texts, reasons = [""] * 6, [""] * 6
    for chunk in client.completions.create(**ask, stop=stop, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
        reasons[chunk.choices[0].index] += chunk.choices[0].finish_reason or ""
    assert texts == [choice.text for choice in whole.choices] == expected
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert reasons == ["length" if cut == text else "stop" for cut, text in zip(expected, free, strict=True)]


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    ask = {"messages": HELLO, "max_completion_tokens": 20, "logprobs": True, "top_logprobs": 3, "n": 2, **GREEDY}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [3] * 20
    assert all(token.top_logprobs[0].token == token.token for token in content)  # greedy takes the most likely
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[index].message.content
        assert mine[-1].finish_reason == "length"
    assert counted(chunks[-1].usage) == counted(whole.usage)


def test_chat_without_a_limit_uses_what_the_context_has_left(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(messages=HELLO, **GREEDY)
    assert made.usage is not None
    assert made.usage.total_tokens == 256
    assert made.choices[0].finish_reason == "length"


COMPLETION = {"model": "tiny", "prompt": "x", "max_tokens": 2}
BAD_FIELDS = [
    ({"temperature": float("nan")}, "temperature"), ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"n": 0}, "n"), ({"n": 10**30}, "n"), ({"n": 1.5}, "n"),
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"), ({"seed": 2**70}, "seed"),
    ({"stop": ""}, "stop"), ({"stop": [1]}, "stop"), ({"stream": "yes"}, "stream"),
    ({"logprobs": 99}, "logprobs"), ({"prompt": None}, "prompt"), ({"prompt": {}}, "prompt"),
    ({"prompt": [[-1]]}, "prompt"), ({"prompt": [384]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [2**80]}, "prompt"), ({"prompt": ["a"] * 300}, "prompt"), ({"model": 5}, "model"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"384": 1}}, "logit_bias"), ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"best_of": 3, "n": 4}, "best_of"), ({"best_of": 3, "stream": True}, "best_of"),
    ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"), ({"prompt": [1, -2]}, "prompt.1: "),
    ({"suffix": "end"}, "suffix: no model of this server fills in"), ({"temprature": 1}, "did you mean 'temperature'"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"response_format": {"type": "xml"}}, "resp"),
    ({"response_format": {"type": "regex"}}, "regex"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), BAD_FIELDS, ids=[json.dumps(change)[:40] for change, _ in BAD_FIELDS])
def test_bad_fields_are_refused_by_name(server: Server, change: dict, says: str) -> None:
    answer = post(server, "/v1/completions", {**COMPLETION, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in error["message"] or says in (error["param"] or "")
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "pirate", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
        {"tools": [{"type": "function"}]},
        {"top_logprobs": 3},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_bad_chats_are_refused(server: Server, change: dict) -> None:
    answer = post(server, "/v1/chat/completions", {"model": "tiny", "messages": HELLO, **change})
    assert answer.status_code == 400, answer.text


BAD_BODIES = {
    "empty": b"", "no json": b"{", "no object": b"[1]", "null": b"null", "not utf-8": b'{"model": "\xff\xfe"}',
    "lone surrogate": b'{"model": "tiny", "prompt": "\\ud800"}', "deep": b'{"prompt":' + b"[" * 200_000,
    "deep and closed": b'{"model":"tiny","prompt":' + b"[" * 900 + b"]" * 900 + b"}",
    "huge number": b'{"model": "tiny", "prompt": "x", "n": 1' + b"0" * 10_000 + b"}",
    "nan": b'{"model": "tiny", "prompt": "x", "top_p": NaN}', "twice": b"{}{}", "gzip": b"\x1f\x8b\x08\x00" * 10,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_bodies_are_refused(server: Server, path: str, name: str) -> None:
    answer = post(server, path, BAD_BODIES[name])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_refused_also_when_its_length_is_not_told(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * (1 << 20)

    assert post(server, "/v1/completions", b" " * (5 << 20)).status_code == 413
    assert httpx.post(server.url + "/v1/completions", content=pieces(), timeout=60).status_code == 413


def test_routes_and_methods_that_are_not_there_have_the_same_shape(server: Server) -> None:
    for answer, status in ((server.get("/v1/nothing"), 404), (server.get("/v1/completions"), 405)):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_client_sees_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError) as overflow:
        client.completions.create(model="tiny", prompt="x " * 300)
    assert overflow.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as overflow:
        client.completions.create(model="tiny", prompt="x", max_tokens=256)
    assert overflow.value.code == "context_length_exceeded"


def test_a_full_queue_answers_429_with_a_time_to_wait(server: Server) -> None:
    """Far more prompt tokens at once than the queue holds: some are answered, the others told when to come back."""

    def ask(number: int) -> httpx.Response:
        ids = [1 + (number * 7 + i) % 300 for i in range(120)]
        return post(server, "/v1/completions", {**COMPLETION, "prompt": ids, "max_tokens": 100, "ignore_eos": True})

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    too_many = post(server, "/v1/completions", {**COMPLETION, "prompt": [[1] * 100] * 5})
    assert too_many.status_code == 400  # waiting would not help
    assert too_many.json()["error"]["code"] == "request_too_large"
    assert post(server, "/v1/completions", COMPLETION).status_code == 200


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {**COMPLETION, "max_tokens": 250, "stream": True, "ignore_eos": True, "n": 4}
    engine = server.engine()
    engine.suspend()  # so that nothing ends by itself
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60):
        assert server.metric("slipway_serve_requests_in_flight") == 4
    server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 0, "the stream to be forgotten")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:  # one that waits for a whole answer, and hangs up
        whole = json.dumps({**body, "stream": False}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(whole)}\r\n\r\n"
        sock.sendall(head.encode() + whole)
        server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 4, "the request to run")
    server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 0, "the request to be forgotten")
    engine.resume()
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())
    server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 0, "a running one to be forgotten")
    server.wait_until(lambda: server.metric("slipway_serve_kv_used_ratio") == 0, "the blocks to come back")


def test_many_streams_at_once_get_each_its_own_answer(server: Server, client: openai.OpenAI) -> None:
    asked = ["def", "import", "class", "The quick", "Ω", "🙂 jumps"]
    alone = [client.completions.create(prompt=p, max_tokens=30, **GREEDY).choices[0].text for p in asked]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as many:

            async def one(prompt: str) -> str:
                stream = await many.completions.create(prompt=prompt, max_tokens=30, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(p) for p in asked))

    assert asyncio.run(together()) == alone


def test_request_ids_and_metrics(server: Server) -> None:
    answer = httpx.post(server.url + "/v1/completions", json=COMPLETION, headers={"x-request-id": "abc-1"}, timeout=60)
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json()["id"] == "cmpl-abc-1"
    assert len(server.get("/health/live").headers["x-request-id"]) == 32
    assert [e["prompt_tokens"] for e in server.events("request") if e["id"] == "abc-1"] == [1]
    text = server.get("/metrics").text
    names = (
        "requests_waiting", "requests_running", "requests_in_flight", "requests_total", "prompt_tokens_total",
        "output_tokens_total", "ttft_seconds", "tpot_seconds", "queue_seconds", "kv_used_ratio", "ready", "model_info",
        "itl_seconds", "queued_tokens", "memory_free_bytes", "model_swaps_total", "prefix_hit_tokens_total",
        "prefix_miss_tokens_total", "preemptions_total", "aborts_total",
    )  # fmt: skip
    for name in names:
        assert f"\nslipway_serve_{name}" in text, name
    assert "slipway_serve_ready 1.0" in text
    for stage in ("start", "weights", "first_token"):
        assert server.metric(f'slipway_serve_load_seconds{{stage="{stage}"}}') > 0


def test_the_server_never_had_an_error_of_its_own(server: Server) -> None:
    """Last in the file: whatever the tests above sent, nothing was answered with 500 or logged as a failure."""
    assert server.metric('slipway_serve_requests_total{outcome="error"}') == 0
    assert server.events("error") == []
    assert server.process.poll() is None
