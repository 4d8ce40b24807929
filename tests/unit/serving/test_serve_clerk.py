"""Large requests are read by a process of their own, as the server reads small ones; it can die, and is bounded."""

import asyncio
import json
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.bounds import MOST_DEPTH, MOST_STATES, grammar_objection, regex_objection, schema_objection
from serving.api.errors import ApiError
from serving.api.protocol import MOST_IDS, ChatRequest, CompletionRequest, parse
from serving.clerk import INLINE_VALUES, MOST_WAITING, Clerk
from serving.engine.child import NICE
from serving.tokenizer import CHARS_PER_TOKEN, Tokenizer

IDS = list(range(2 * INLINE_VALUES))
LARGE = json.dumps({"model": "tiny", "prompt": IDS}).encode()


@pytest.fixture
def clerk() -> Iterator[Clerk]:
    clerk = Clerk()
    yield clerk
    clerk.close()


def test_what_is_large_is_read_and_refused_in_the_same_words(clerk: Clerk) -> None:
    async def both() -> None:
        assert await clerk.read(CompletionRequest, LARGE) == parse(CompletionRequest, LARGE)
        for wrong in (
            LARGE[:-1],
            LARGE.replace(b" 9,", b" -9,"),
            LARGE.replace(b'"model"', b'"modle"'),
            b'{"model": "tiny", "prompt": [[' + b"1," * MOST_IDS + b"1], [1]]}",
            json.dumps({"model": "tiny", "prompt": "x", "response_format": {
                "type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": IDS}}}}).encode(),
        ):  # fmt: skip
            with pytest.raises(ApiError) as refused:
                await clerk.read(CompletionRequest, wrong)
            with pytest.raises(ApiError) as expected:
                parse(CompletionRequest, wrong)
            assert refused.value.status == expected.value.status == 400
            assert refused.value.body() == expected.value.body()

    asyncio.run(both())


def test_a_clerk_that_dies_is_replaced_and_too_many_are_turned_away(clerk: Clerk) -> None:
    async def story() -> None:
        await clerk.read(CompletionRequest, LARGE)
        assert clerk._process is not None
        process = psutil.Process(clerk._process.pid)
        assert process.nice() == min(19, psutil.Process().nice() + NICE)
        process.kill()
        with pytest.raises(ApiError) as lost:
            await clerk.read(CompletionRequest, LARGE)
        assert lost.value.status == 413
        asked = [clerk.read(CompletionRequest, LARGE) for _ in range(MOST_WAITING + 3)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        refused = [error.status for error in found if isinstance(error, ApiError)]
        assert refused == [429] * 3
        assert await clerk.read(CompletionRequest, LARGE) == parse(CompletionRequest, LARGE)

    asyncio.run(story())


def test_what_is_used_for_nothing_is_not_kept() -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "metadata": {"a": [1] * 100}}).encode()
    assert parse(CompletionRequest, body).metadata is None


def test_tools_are_bounded_together() -> None:
    schema = {"type": "string", "description": "x" * 60_000}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(5)]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    with pytest.raises(ApiError, match="together"):
        parse(ChatRequest, json.dumps(body).encode())
    parse(ChatRequest, json.dumps({**body, "tools": tools[:4]}).encode())


@given(text=st.text(alphabet="word def\n()é", max_size=300), most=st.integers(1, 40))
def test_a_text_of_too_many_tokens_is_known_by_its_beginning(tiny, text: str, most: int) -> None:
    tokenizer = Tokenizer(tiny)
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.encode_at_most(text, most, special=False) == (ids if len(ids) <= most else None)


def test_no_more_of_a_text_is_read_than_its_context_asks_for(tiny) -> None:
    tokenizer, read = Tokenizer(tiny), []
    encode = tokenizer.encode
    tokenizer.encode = lambda text, *, special: read.append(len(text)) or encode(text, special=special)
    assert tokenizer.encode_at_most("(é " * 100_000, 64, special=False) is None
    assert sum(read) < 10 * CHARS_PER_TOKEN * 64


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_an_expressions_states_are_its_counts_multiplied(a: int, b: int, c: int) -> None:
    said = regex_objection(f"(([a-z]{{{a}}}){{1,{b}}}|x){{{c}}}")
    assert bool(said) == (c * (a * b + 1) > MOST_STATES)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
        r"\{\d+\}[]x]",
        "a{2,}",
        "{",
        "a|b(c|d)*",
        "[{}]{1000}",
        "(",
        ")",
        "[",
        "\\",
        ".{0,5000}",
    ],
)
def test_expressions_that_cost_little_pass(pattern: str) -> None:
    assert regex_objection(pattern) == ""


def test_what_explodes_or_is_deep_is_refused_before_it_is_compiled() -> None:
    explodes = "(((a{1000}){1000}){1000}){1000}"
    deep: object = {"type": "integer"}
    for _ in range(MOST_DEPTH):
        deep = {"items": deep}
    for said in (
        regex_objection(explodes),
        regex_objection("(" * 10_000),
        schema_objection({"properties": {"a": {"items": [{"pattern": explodes}]}}}),
        schema_objection({"patternProperties": {explodes: True}}),
        schema_objection(deep),
        grammar_objection(f"start: /{explodes}/"),
        grammar_objection('start: "a"~1..99999999'),
    ):
        assert said
    assert (
        schema_objection({"properties": {"pattern": {"pattern": "[a-z]+"}, "patternProperties": {"type": "null"}}})
        == ""
    )
    assert grammar_objection('start: "a"~1..9 /b{3}/ "c"') == ""
