"""The parts of a chat: messages of each role, and the tools that the model may call."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Text = Annotated[str, Field(max_length=4_000_000)]
Name = Annotated[str, Field(max_length=256)]
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Ignored = Annotated[
    Any,
    BeforeValidator(lambda _: None),
    Field(description="Accepted, and used for nothing: no answer depends on it."),
]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Part):
    type: Literal["text"]
    text: Text


Content = Text | list[TextPart]


def plain(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class FunctionCall(Part):
    name: FunctionName
    arguments: Text  # JSON, as the model wrote it
    parsed_arguments: Ignored = None  # the same, which OpenAI's client adds to what it got and sends back


class ToolCall(Part):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored = None  # in a stream

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments out as JSON themselves, so they want the object."""
        try:
            arguments: Any = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class PromptMessage(Part):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Name | None = None

    def for_template(self) -> dict[str, Any]:
        named = {} if self.name is None else {"name": self.name}
        # Templates of open models know `system`, which is what OpenAI's newer `developer` stands for.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": plain(self.content), **named}


class AssistantMessage(Part):
    """What a model said, also as OpenAI's client holds it: with fields that are empty, and what it read from the content."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128)] | None = None
    audio: None = None
    function_call: None = None
    annotations: Ignored = None
    parsed: Ignored = None

    def for_template(self) -> dict[str, Any]:
        calls = {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": plain(self.content) or self.refusal or "", **calls}


class ToolMessage(Part):
    role: Literal["tool"]
    content: Content
    tool_call_id: Name

    def for_template(self) -> dict[str, Any]:
        return {"role": "tool", "content": plain(self.content), "tool_call_id": self.tool_call_id}


Message = Annotated[PromptMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Part):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: FunctionName


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Part):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedToolChoice(Part):
    """`auto` or `required`, of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")]
