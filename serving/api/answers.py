"""What the routes answer, as JSON schemas for `/openapi.json`. Tests hold the answers to them."""

from typing import Any

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _page(of: Schema) -> Schema:
    ends = {"first_id": MAYBE_STRING, "last_id": MAYBE_STRING}
    return _object(object=_const("list"), data=_list(of), has_more={"type": "boolean"}, **ends)


def _const(value: str) -> Schema:
    return {"type": "string", "const": value}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
MAYBE_STRING, MAYBE_OBJECT = {"type": ["string", "null"]}, {"type": ["object", "null"]}
REASON = {"type": "string", "enum": ["stop", "length", "tool_calls"]}

HEALTH = {"type": "object", "required": ["status"], "properties": {"status": STRING}}
MODEL = _object(
    id=STRING, object=_const("model"), created=INTEGER, owned_by=STRING, max_model_len=INTEGER, digest=MAYBE_STRING,
    parent=MAYBE_STRING,
)  # fmt: skip
MODELS = _object(object=_const("list"), data=_list(MODEL))
USAGE = _object(
    prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER, prompt_tokens_details=MAYBE_OBJECT
)
COMPLETION = _object(
    id=STRING, object=_const("text_completion"), created=INTEGER, model=STRING, usage=USAGE,
    choices=_list(_object(index=INTEGER, text=STRING, logprobs=MAYBE_OBJECT, finish_reason=REASON)),
)  # fmt: skip
CALL = _object(id=STRING, type=_const("function"), function=_object(name=STRING, arguments=STRING))
MESSAGE = {
    "type": "object",
    "required": ["role", "content", "refusal"],
    "properties": {
        "role": _const("assistant"), "content": MAYBE_STRING, "refusal": MAYBE_STRING, "tool_calls": _list(CALL),
    },
}  # fmt: skip
CHAT = _object(
    id=STRING, object=_const("chat.completion"), created=INTEGER, model=STRING, usage=USAGE,
    choices=_list(_object(index=INTEGER, message=MESSAGE, logprobs=MAYBE_OBJECT, finish_reason=REASON)),
)  # fmt: skip
EMBEDDINGS = _object(
    object=_const("list"), model=STRING, usage=_object(prompt_tokens=INTEGER, total_tokens=INTEGER),
    data=_list(_object(object=_const("embedding"), index=INTEGER, embedding={"anyOf": [_list(NUMBER), STRING]})),
)  # fmt: skip
TOKENS = _object(tokens=_list(INTEGER), count=INTEGER, max_model_len=INTEGER)
TEXT = _object(prompt=STRING)
EVENT = _object(data=STRING)  # one server-sent event: a chunk as JSON, an error as JSON, or [DONE]
COUNTS = _object(total=INTEGER, completed=INTEGER, failed=INTEGER)
FILE = _object(
    id=STRING, object=_const("file"), bytes=INTEGER, created_at=INTEGER, filename=STRING, purpose=STRING, status=STRING
)
FILES = _page(FILE)
BATCH = _object(
    id=STRING, object=_const("batch"), endpoint=STRING, input_file_id=STRING, completion_window=STRING, status=STRING,
    created_at=INTEGER, request_counts=COUNTS, output_file_id=MAYBE_STRING, error_file_id=MAYBE_STRING,
    errors=MAYBE_OBJECT,
)  # fmt: skip
BATCHES = _page(BATCH)
DELETED = _object(id=STRING, object=STRING, deleted={"type": "boolean"})
SESSION = _object(user=MAYBE_STRING, login_required={"type": "boolean"}, model=STRING)
CONVERSATION = _object(id=STRING, title=STRING, messages=_list(_object(role=STRING, content=STRING)), changed_s=NUMBER)
CONVERSATIONS = _object(conversations=_list(CONVERSATION))


def of(schema: Schema, *, stream: bool = False) -> dict[str, Any]:
    """OpenAPI's response with this body, or with a stream of events where the request asks for one."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": EVENT}
    return {"description": "The answer", "content": content}
