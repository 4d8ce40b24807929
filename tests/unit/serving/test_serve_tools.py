"""Calls of tools, read from a model's text: however the text is cut, and whatever it is."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.messages import Tool
from serving.api.tools import CLOSE, OPEN, Call, CallParser, introduce

NAMES = {"weather", "time"}
ARGUMENTS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans()), max_size=3
)


def parse(
    pieces: list[str], *, forced: bool = False, most_calls: int | None = None
) -> tuple[str, list[tuple[str, dict]]]:
    parser = CallParser(NAMES, forced=forced, most_calls=most_calls)
    said, calls = "", []
    for text, found in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        said += text
        calls += found
    assert parser.num_calls == len(calls)
    return said, [(call.name, json.loads(call.arguments)) for call in calls]


def cut(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    before=st.text(alphabet="ab <tool_", max_size=12),
    arguments=st.lists(ARGUMENTS, min_size=1, max_size=3),
    at=st.lists(st.integers(0, 400), max_size=8),
)
def test_marked_calls_are_found_however_the_text_is_cut(before: str, arguments: list[dict], at: list[int]) -> None:
    calls = "".join(f"{OPEN}\n{json.dumps({'name': 'weather', 'arguments': a})}\n{CLOSE}" for a in arguments)
    said, found = parse(cut("x" + before + calls, at))
    assert (said, found) == ("x" + before, [("weather", a) for a in arguments])
    assert parse(cut("x" + before + calls, at), most_calls=1) == (said, found[:1])


@given(text=st.text(alphabet='ab {}[]"<tool_call>/\n', max_size=40), at=st.lists(st.integers(0, 50), max_size=8))
def test_text_without_calls_comes_back_whole(text: str, at: list[int]) -> None:
    said, calls = parse(cut(text, at))
    assert (said, calls) == (text, [])


@pytest.mark.parametrize(
    "text", ['{"name": "time", "parameters": {"at": 1}}', ' [{"name": "time", "arguments": {"at": 1}}]']
)
def test_an_answer_that_is_nothing_but_calls(text: str) -> None:
    assert parse(list(text)) == ("", [("time", {"at": 1})])
    assert parse([text], forced=True) == ("", [("time", {"at": 1})])


@pytest.mark.parametrize(
    "text", ['{"name": "rm"}', '{"answer": 42}', '{"name": "time"', f"{OPEN}no json{CLOSE}", f"{OPEN}half"]
)
def test_what_is_no_call_of_a_known_tool_is_text(text: str) -> None:
    assert parse(list(text)) == (text, [])


@given(arguments=ARGUMENTS, at=st.integers(0, 200), forced=st.booleans())
def test_a_call_that_is_cut_is_told_as_far_as_it_goes(arguments: dict, at: int, forced: bool) -> None:
    """Never as text where a call was demanded; else as text until it can be nothing but a call."""
    head, written = '{"name": "weather", "arguments": ', json.dumps(arguments)
    text = (head + written + "}")[:at]
    parser = CallParser(NAMES, forced=forced)
    said, calls = parser.push(text)
    rest, last = parser.flush()
    if len(text) < len(head.rstrip()):
        assert (said + rest, calls + last) == ("" if forced else text, [])
    else:
        (call,) = last
        assert (said + rest, calls, call.name) == ("", [], "weather")
        assert call.arguments == text[len(head) :] or json.loads(call.arguments) == arguments


def test_a_template_that_knows_no_tools_is_told_of_them_and_of_their_results_in_words() -> None:
    call = Call("time", '{"at": 1}').body() | {"function": {"name": "time", "arguments": {"at": 1}}}
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": call["id"]},
    ]
    tool = Tool.model_validate({"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}})
    assert '"name": "time"' in introduce(messages, [tool])[0]["content"]
    (told, called, result) = introduce(messages, [])
    assert told == messages[0]
    assert parse([called["content"]])[1] == [("time", {"at": 1})]
    assert (result["role"], "noon" in result["content"]) == ("user", True)
