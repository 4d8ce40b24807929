"""What a request may say. Strict: what would be ignored is refused, unless ignoring it changes no answer."""

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.api.errors import bad_request
from serving.engine.messages import SamplingParams

# For the client's own records, or for a speed that this server always gives: no answer depends on them.
HARMLESS = frozenset(
    [
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "service_tier",
        "parallel_tool_calls",
        "verbosity",
    ]
)
# Understood, and not offered: only the value that asks for nothing is taken.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

Text = Annotated[str, Field(max_length=4_000_000)]
TokenIds = list[Annotated[int, Field(ge=0)]]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: never added here


class GenerationRequest(Strict):
    """What completions and chat have in common."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept = {}
        for key, value in raw.items():
            if key in cls.model_fields:
                kept[key] = value
            elif key in NEUTRAL:
                # `==` would take False for 0: a boolean is not the neutral number.
                if value is not None and (isinstance(value, bool) or value not in NEUTRAL[key]):
                    raise ValueError(f"'{key}' is not supported by this server; leave it out")
            elif key not in HARMLESS:
                nearest = difflib.get_close_matches(key[:100], cls.model_fields, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
                raise ValueError(f"unknown field '{key[:100]}'{hint}")
        return kept

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for stream=true only")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, choice: int, max_tokens: int, logprobs: int | None, prompt_logprobs: bool) -> SamplingParams:
        """The parameters of one of the n choices: each has a seed of its own, so that they differ."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=None if self.seed is None else hash((self.seed, choice)) if choice else self.seed,
            stop=stop,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(GenerationRequest):
    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Annotated[str, Field(max_length=256)] | None = None

    def for_template(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        # Templates of open models know `system`, which is what OpenAI's newer `developer` stands for.
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **named}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs logprobs=true")
        return self


R = TypeVar("R", bound=GenerationRequest)


def parse(kind: type[R], body: bytes) -> R:
    """The request in `body`. Raises `ApiError` (400) that names the first thing that is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = ".".join(str(step) for step in first["loc"] if not (isinstance(step, str) and "[" in step))
        message = first["msg"].removeprefix("Value error, ")
        raise bad_request(f"{path}: {message}" if path else message, param=path or None) from None
