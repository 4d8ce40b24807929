"""Function calling: how the model is told of tools, how it is held to them, and how its calls are read from its text.

Models write calls in a few forms, and the text alone tells which: `<tool_call>{…}</tool_call>` (Hermes, Qwen), or an
answer that is nothing but `{"name", "parameters"}` (Llama 3) or a list of `{"name", "arguments"}` (Mistral).
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.api.messages import Tool
from serving.api.protocol import json_structure
from serving.engine.messages import Structure

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGUN = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(.*)', re.DOTALL)
PREFACE = (
    f'To call a function, answer with {OPEN}{{"name": <name>, "arguments": <object>}}{CLOSE} and nothing else. '
    "You may call these, each given with the JSON schema of its arguments:\n"
)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def body(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def structure_of(tools: Sequence[Tool]) -> Structure:
    """What an answer must look like when a call is demanded: `{"name", "arguments"}` of one of the tools."""
    options = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return json_structure(options[0] if len(options) == 1 else {"anyOf": options}, param="tools")


def introduce(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools: told of in the first message, calls and results as text."""
    described = "\n".join(json.dumps(tool.function.model_dump(exclude_none=True)) for tool in tools)
    result = [{"role": "system", "content": PREFACE + described}] if tools else []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            content += OPEN + json.dumps(call["function"]) + CLOSE
        role = "user" if message["role"] == "tool" else message["role"]
        if message["role"] == "tool":
            content = f"<tool_response>{content}</tool_response>"
        if result and role == result[-1]["role"] == "system":
            result[-1] = {"role": "system", "content": f"{result[-1]['content']}\n\n{content}"}
        else:
            result.append({"role": role, "content": content})
    return result


class CallParser:
    """Text in pieces in, text and calls out. Of what it returns nothing is taken back; joined, it is the same for
    every way to cut the text into pieces. Of more than `most_calls` the first are told."""

    def __init__(self, names: set[str], *, forced: bool, most_calls: int | None = None) -> None:
        self._names, self._forced, self._most_calls = names, forced, most_calls
        self._held = ""
        # None: nothing but space so far. "text": as it is. "mark": inside <tool_call>. "whole": JSON from the start.
        self._state: str | None = "whole" if forced else None
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        said, calls = "", []
        while True:
            before = (self._state, self._held)
            if self._state is None:
                start = self._held.lstrip()
                if start:
                    self._state = "whole" if start[0] in "{[" else "text"
            elif self._state == "text":
                said += self._take_text()
            elif self._state == "mark" and CLOSE in self._held:
                inside, self._held = self._held.split(CLOSE, 1)
                found = self._read(inside)
                said += "" if found else OPEN + inside + CLOSE
                calls += found
                self._state = "text"
            if (self._state, self._held) == before:
                return said, self._counted(calls)

    def flush(self) -> tuple[str, list[Call]]:
        """What was held when the answer ended: a call whose end was left out, or text after all.

        A call that `max_tokens` has cut is told as far as it goes, as OpenAI does: its arguments are then no whole JSON. Where
        a call was demanded there is no text, even if not so much as a name was reached.
        """
        held, self._held = self._held, ""
        if self._state in ("whole", "mark"):
            calls = self._read(held) or self._begun(held)
            if calls or self._forced:
                return "", self._counted(calls)
        return (OPEN if self._state == "mark" else "") + held, []

    def _counted(self, calls: list[Call]) -> list[Call]:
        if self._most_calls is not None:
            calls = calls[: self._most_calls - self.num_calls]
        self.num_calls += len(calls)
        return calls

    def _take_text(self) -> str:
        """Text up to the next mark, less what may be the beginning of one."""
        at = self._held.find(OPEN)
        if at >= 0:
            text, self._held, self._state = self._held[:at], self._held[at + len(OPEN) :], "mark"
            return text
        keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _begun(self, text: str) -> list[Call]:
        found = BEGUN.fullmatch(text)
        return [Call(found[1], found[2])] if found and found[1] in self._names else []

    def _read(self, text: str) -> list[Call]:
        """The calls that a JSON text stands for; none when it is anything else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or item.get("name") not in self._names:
                return []
            arguments = item.get("arguments", item.get("parameters", {}))
            calls.append(Call(item["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
        return calls
