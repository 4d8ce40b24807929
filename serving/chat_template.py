"""A package's chat template: messages to prompt text, by Jinja in a sandbox (templates come with the weights)."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.errors import Refused
from serving.tokenizer import read_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    def __init__(self, source: str, *, special_tokens: dict[str, str], where: str) -> None:
        # The names and switches are those that Transformers gives templates, and that they are written against.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = special_tokens
        self.knows_tools = "tools" in source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise Refused(
                f"the chat template cannot be read: {error}", where=where, fix="Export the model again"
            ) from None

    @classmethod
    def read(cls, root: Path) -> "ChatTemplate | None":
        """The package's template, from `chat_template.jinja` or `tokenizer_config.json`; None when it has none."""
        config = read_json(root / "tokenizer_config.json")
        tokens = {}
        for key in SPECIAL_TOKENS:
            value = config.get(key)
            tokens[key] = value.get("content", "") if isinstance(value, dict) else value or ""
        path = root / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), special_tokens=tokens, where=str(path))
        source = config.get("chat_template")
        if isinstance(source, list):  # several named templates, of which `default` is for plain chat
            source = {t.get("name"): t.get("template") for t in source}.get("default")
        where = str(root / "tokenizer_config.json")
        return cls(source, special_tokens=tokens, where=where) if isinstance(source, str) else None

    def render(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]]) -> str:
        """The prompt that asks for the next assistant message. Raises `ValueError` with the template's own objection."""
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from None


def _raise(message: str) -> None:
    raise TemplateError(message)
