"""What applications are written with works unmodified: OpenAI's own client, LangChain's and LlamaIndex's adapters."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

import openai
import pydantic
import pytest
from conftest import Server
from tiny_packages import make_package

from tests.beside import installed_beside

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "maximum": 9, "minimum": 1},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {"name": {"enum": ["Oslo", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["name", "warm"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "Hello"}]
ASK = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 120}


LLAMA_INDEX = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

base = {"api_base": sys.argv[1], "api_key": "unused", "max_retries": 0}
model = OpenAILike(model="tiny", is_chat_model=True, temperature=0, max_tokens=40, context_window=2048, **base)
asked = [ChatMessage(role="user", content="Hello")]
whole = model.chat(asked).message.content
streamed = "".join(piece.delta or "" for piece in model.stream_chat(asked))
vectors = OpenAILikeEmbedding(model_name="tiny", **base).get_text_embedding_batch(["a", "b"])
print(json.dumps({"whole": whole, "streamed": streamed, "vectors": vectors}))
"""


class City(pydantic.BaseModel):
    name: Literal["Oslo", "Rome"]
    warm: bool


class Choose(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, start_server) -> Server:
    """A context that has room for the description of a tool, of which a byte is nearly a token here."""
    package = make_package(tmp_path_factory.mktemp("package") / "tiny", max_position_embeddings=2048)
    return start_server(package).wait_ready()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def is_weather(arguments: str) -> bool:
    value = json.loads(arguments)
    return value["city"] in ("Oslo", "Rome") and 1 <= value["days"] <= 9


def test_a_tool_that_is_required_is_called_whole_and_streamed(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        whole = client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice=choice).choices[0]
        assert whole.finish_reason == "tool_calls"
        (call,) = whole.message.tool_calls or ()
        assert whole.message.content is None
        assert call.function.name == "weather"
        assert is_weather(call.function.arguments)
        streamed = list(client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice=choice, stream=True))
        deltas = [c for chunk in streamed for c in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments
        assert streamed[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in streamed)
        cut = client.chat.completions.create(**{**ASK, "max_tokens": 48}, tools=[WEATHER], tool_choice=choice).choices[
            0
        ]
        assert (cut.finish_reason, cut.message.content) == ("length", None)
        assert call.function.arguments.startswith(cut.message.tool_calls[0].function.arguments.strip()[:5])
    answered = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "mild"},
    ]
    assert client.chat.completions.create(**{**ASK, "messages": answered}, tools=[WEATHER]).choices[0].message.content


def test_what_openais_client_has_parsed_may_be_sent_back_to_it(client: openai.OpenAI) -> None:
    chat, tools = client.chat.completions, [openai.pydantic_function_tool(Choose)]
    said = chat.parse(**ASK, response_format=City).choices[0].message
    called = chat.parse(**ASK, tools=tools, tool_choice="required").choices[0].message
    (call,) = called.tool_calls or ()
    assert isinstance(said.parsed, City)
    assert isinstance(call.function.parsed_arguments, Choose)
    with chat.stream(**ASK, tools=tools, tool_choice="required") as stream:
        streamed = stream.get_final_completion().choices[0].message
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    plain = chat.create(**ASK).choices[0].message.model_dump()
    for turns in ([said], [called, result], [streamed, result], [plain]):
        again = chat.create(**{**ASK, "messages": [*HELLO, *turns, *HELLO]}, tools=tools).choices[0]
        assert again.message.content


def test_of_allowed_tools_one_of_them_is_called(client: openai.OpenAI) -> None:
    tools = [WEATHER, openai.pydantic_function_tool(Choose)]
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "Choose"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    for seed in range(4):
        ask = {**ASK, "temperature": 1, "seed": seed}
        made = client.chat.completions.create(**ask, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        assert [call.function.name for call in made.choices[0].message.tool_calls or ()] == ["Choose"]
    with pytest.raises(openai.BadRequestError, match="not in 'tools'"):
        client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice=choice)


def test_structured_answers_have_their_structure(client: openai.OpenAI) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    made = client.chat.completions.create(**ASK, response_format=asked).choices[0]
    assert City.model_validate_json(made.message.content or "").name in ("Oslo", "Rome")
    plain = client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=40,
        extra_body={"response_format": {"type": "regex", "regex": "[ab]{3}-[0-9]{2}"}},
    )
    text = plain.choices[0].text
    assert (len(text), set(text[:3]) <= {"a", "b"}, text[3]) == (6, True, "-")
    assert plain.choices[0].finish_reason == "stop"


def test_sampling_parameters_do_what_they_say(client: openai.OpenAI) -> None:
    def text(**more) -> str:
        return (
            client.completions.create(model="tiny", prompt="def", max_tokens=12, temperature=0, **more).choices[0].text
        )

    tokens = client.post("/tokenize", body={"model": "tiny", "prompt": text()}, cast_to=dict)["tokens"]
    assert text(logit_bias={str(tokens[0]): -100})[:1] != text()[:1]
    assert text(extra_body={"stop_token_ids": [tokens[0]]}) == ""
    assert text(frequency_penalty=2, presence_penalty=2) != text()
    best = client.completions.create(model="tiny", prompt="def", max_tokens=8, n=2, best_of=6, seed=3, logprobs=0)
    mean = [sum(lp) / len(lp) for c in best.choices if c.logprobs and (lp := c.logprobs.token_logprobs)]
    assert mean[0] >= mean[1]


def test_text_goes_to_tokens_and_back(client: openai.OpenAI) -> None:
    made = client.post("/tokenize", body={"model": "tiny", "prompt": "naïve 🙂"}, cast_to=dict)
    assert made["count"] == len(made["tokens"])
    assert (
        client.post("/detokenize", body={"model": "tiny", "tokens": made["tokens"]}, cast_to=dict)["prompt"]
        == "naïve 🙂"
    )
    chat = client.post("/tokenize", body={"model": "tiny", "messages": HELLO}, cast_to=dict)
    usage = client.chat.completions.create(**{**ASK, "max_tokens": 1}).usage
    assert usage is not None
    assert chat["count"] == usage.prompt_tokens


def test_embeddings_are_of_unit_length_and_alike_for_like_texts(client: openai.OpenAI) -> None:
    one, two, same = (e.embedding for e in client.embeddings.create(model="tiny", input=["a cat", "12", "a cat"]).data)
    assert math.isclose(math.hypot(*one), 1, rel_tol=1e-5)
    assert math.dist(one, same) < 1e-4 < math.dist(one, two)
    short = client.embeddings.create(model="tiny", input="a cat", dimensions=8).data[0].embedding
    assert (len(short), math.isclose(math.hypot(*short), 1, rel_tol=1e-5)) == (8, True)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="tiny", input="a cat", dimensions=10_000)


def test_langchain(server: Server) -> None:
    adapters = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    base = {"base_url": server.url + "/v1", "api_key": "unused", "model": "tiny", "max_retries": 0}
    chat = adapters.ChatOpenAI(**base, temperature=0, max_tokens=120)
    whole = chat.invoke("Hello")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole.content
    called = chat.bind_tools([WEATHER], tool_choice="required").invoke("Hello")
    assert is_weather(json.dumps(called.tool_calls[0]["args"]))
    made = chat.with_structured_output(City, method="json_schema").invoke("Hello")
    assert isinstance(made, City)
    embeddings = adapters.OpenAIEmbeddings(**base, check_embedding_ctx_length=False)
    assert len(embeddings.embed_documents(["a", "b"])) == 2


def test_llama_index(server: Server) -> None:
    """In a process of its own: its newest release needs an older client of OpenAI's than this project's."""
    packages = installed_beside("llama-index-llms-openai-like", "llama-index-embeddings-openai-like")
    env = {**os.environ, "PYTHONPATH": str(packages)}
    command = [sys.executable, "-c", LLAMA_INDEX, server.url + "/v1"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["whole"]
    assert told["streamed"] == told["whole"]
    assert [len(vector) for vector in told["vectors"]] == [64, 64]
