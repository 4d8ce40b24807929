"""Chats as text by a package's own template, and which of its characters are the assistant's."""

import json
import re
from datetime import UTC, datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.errors import Refused

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | str | None
"""Descriptions of functions, or their JSON."""
ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A Hugging Face chat template (jinja2, in a sandbox: a package is somebody else's)."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now(UTC).strftime(form),
            "bos_token": bos,
            "eos_token": eos,
        }
        # Transformers' own marks around what the assistant says; here the answers are found without them.
        source = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", source)
        source = re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", source)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise Refused(f"cannot be parsed: {error}", where="chat_template", fix="Mend the package's.") from None

    def render(self, messages: Messages, *, tools: Tools = None, answer_next: bool = False) -> str:
        """The text of a chat; with `answer_next` up to where the assistant begins to speak."""
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return self._template.render(messages=messages, add_generation_prompt=answer_next, tools=tools, documents=None)

    def with_answers(self, messages: Messages, *, where: str, tools: Tools = None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, end) of what the assistant says in it, each with the mark that ends its turn.

        An answer is what its message adds to the text up to the invitation to speak. Where a template shows an answer
        otherwise once others follow (thoughts that it drops later), that answer is read and not learnt. Raises Refused
        for what is no chat.
        """
        check_chat(messages, where=where)
        try:
            whole, answers = self.render(messages, tools=tools), []
            for number, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = self.render(messages[:number], tools=tools, answer_next=True)
                after = whole if number == len(messages) - 1 else self.render(messages[: number + 1], tools=tools)
                if whole.startswith(after) and after.startswith(before):
                    answers.append((len(before), max(len(before), len(after.rstrip()))))
        except Exception as error:  # a template is somebody else's program, and may fail as any does
            fix = "Mend the row or the template."
            raise Refused(f"the chat template refuses a chat: {error}", where=where, fix=fix) from None
        return whole, answers


def check_chat(messages: Any, *, where: str) -> None:
    """Raises Refused for what is no list of messages."""
    fix = 'Write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'
    if not isinstance(messages, list) or not messages:
        raise Refused("a row holds no list of messages", where=where, fix=fix)
    for message in messages:
        if not isinstance(message, dict) or not (isinstance(message.get("content"), str) or _only_calls(message)):
            raise Refused("a message holds no text in 'content'", where=where, fix=fix)
        if message.get("role") not in ROLES:
            raise Refused(f"a message has role {message.get('role')!r}, not {', '.join(ROLES)}", where=where, fix=fix)


def _only_calls(message: dict[str, Any]) -> bool:
    """Whether the assistant asks for tools and says nothing."""
    return message.get("content") is None and bool(message.get("tool_calls"))


def _tojson(value: Any, indent: int | None = None) -> str:
    """As Transformers has it: jinja's own is for web pages, and escapes `<`."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
