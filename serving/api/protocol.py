"""What a request may say. Strict: what would be ignored is refused, unless ignoring it changes no answer."""

import difflib
import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from serving.api.bounds import grammar_objection, regex_objection, schema_objection
from serving.api.errors import bad_request
from serving.api.messages import AllowedToolChoice, Ignored, Message, NamedTool, Text, Tool, ToolChoice
from serving.engine.messages import SamplingParams, Structure

STRUCTURE_LIMIT_CHARS = 64 << 10  # of a schema, a regular expression or a grammar
TOOLS_LIMIT_CHARS = 256 << 10
MOST_IDS = 1 << 18  # in one request, of all its prompts together
UNION_STEP = re.compile(r"[A-Z]|constrained-|\w+\[")  # what pydantic calls one of the forms that a value may have
JSON_OBJECT = '{"type": "object"}'


def _without_suffix(suffix: str) -> str:
    if suffix:
        raise ValueError("no model of this server fills in the middle of a text; leave it out")
    return suffix


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]  # one error says as much as a million
Prompt = Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=256)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NoSuffix = Annotated[str, AfterValidator(_without_suffix), WithJsonSchema({"type": "string", "const": ""})]
Rule = Annotated[str, Field(min_length=1, max_length=STRUCTURE_LIMIT_CHARS)]


def each(prompt: Prompt) -> list[str | list[int]]:
    """The prompts of a request, which may be one, as text or as ids."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [cast("str | list[int]", prompt)]
    return cast("list[str | list[int]]", prompt)


def _bounded(prompt: Prompt) -> Prompt:
    if sum(len(ids) for ids in each(prompt) if not isinstance(ids, str)) > MOST_IDS:
        raise ValueError(f"more than {MOST_IDS} token ids")
    return prompt


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, raw: Any) -> Any:
        for key in raw if isinstance(raw, dict) else ():
            if key not in cls.model_fields:
                nearest = difflib.get_close_matches(str(key)[:100], cls.model_fields, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
                raise ValueError(f"unknown field '{str(key)[:100]}'{hint}")
        return raw


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False  # padding against traffic analysis: never added here


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def unless(objection: Callable[[str], str]) -> AfterValidator:
    """A rule that is refused where `objection` has something to say."""

    def check(rule: str) -> str:
        if why := objection(rule):
            raise ValueError(why)
        return rule

    return AfterValidator(check)


class RegexFormat(Strict):
    type: Literal["regex"]
    regex: Annotated[Rule, unless(regex_objection)]


class GrammarFormat(Strict):
    type: Literal["grammar"]
    grammar: Annotated[Rule, unless(grammar_objection)]


Format = Annotated[PlainFormat | JsonSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")]


class GenerationRequest(Strict):
    """What completions and chat have in common. `top_k` to `ignore_eos` go beyond OpenAI's, in vLLM's names."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    response_format: Format | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = 1.0
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    ignore_eos: bool | None = False
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for stream=true only")
        return self

    @model_validator(mode="after")
    def _structure_is_harmless(self) -> "GenerationRequest":
        _ = self.structure  # made, and refused, where the request is read: it may take a while
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @cached_property
    def structure(self) -> Structure | None:
        """The form that `response_format` asks for."""
        match self.response_format:
            case JsonSchemaFormat(json_schema=JsonSchema(schema_=dict() as schema)):
                return json_structure(schema, param="response_format")
            case JsonSchemaFormat() | PlainFormat(type="json_object"):
                return Structure("json_schema", JSON_OBJECT)
            case RegexFormat(regex=regex):
                return Structure("regex", regex)
            case GrammarFormat(grammar=grammar):
                return Structure("grammar", grammar)
        return None

    def sampling(
        self, *, choice: int, max_tokens: int, logprobs: int | None, vocab_size: int,
        prompt_logprobs: bool = False, structure: Structure | None = None,
    ) -> SamplingParams:  # fmt: skip
        """The parameters of one of the n choices: each has a seed of its own, so that they differ."""
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        outside = [token for token, _ in bias if token >= vocab_size]
        if outside:
            raise bad_request(f"Token {outside[0]} is outside the vocabulary of {vocab_size}", param="logit_bias")
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=bias,
            seed=None if self.seed is None else hash((self.seed, choice)) if choice else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            structure=structure or self.structure,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(GenerationRequest):
    prompt: Annotated[Prompt, AfterValidator(_bounded)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: NoSuffix | None = None

    @model_validator(mode="after")
    def _best_of_has_something_to_choose_from(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("'best_of' must be at least 'n'")
        if self.num_candidates > (self.n or 1) and self.stream:
            raise ValueError("'best_of' above 'n' is chosen at the end, so it cannot be streamed")
        return self

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.n or 1


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = True

    @model_validator(mode="after")
    def _parts_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs logprobs=true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two 'tools' have one name")
        described = sum(len(json.dumps(tool.function.parameters)) for tool in self.tools or ())
        if described > TOOLS_LIMIT_CHARS:
            raise ValueError(f"the schemas of 'tools' are longer than {TOOLS_LIMIT_CHARS} characters together")
        unknown = [name for name in self._chosen or () if name not in names]
        if unknown:
            raise ValueError(f"'tool_choice' names '{unknown[0]}', which is not in 'tools'")
        if self.must_call and not names:
            raise ValueError("'tool_choice' is 'required' and there are no 'tools'")
        return self

    @property
    def _chosen(self) -> list[str] | None:
        """The tools that `tool_choice` names; None where it names none."""
        match self.tool_choice:
            case NamedTool(function=function):
                return [function.name]
            case AllowedToolChoice(allowed_tools=allowed):
                return [tool.function.name for tool in allowed.tools]
        return None

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        if self.tool_choice == "none":
            return []
        chosen = self._chosen
        return [tool for tool in self.tools or () if chosen is None or tool.function.name in chosen]

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be a call, and nothing else."""
        match self.tool_choice:
            case AllowedToolChoice(allowed_tools=allowed):
                return allowed.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class EmbeddingRequest(Strict):
    model: str
    input: Annotated[Prompt, AfterValidator(_bounded)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Ignored = None


class TokenizeRequest(Strict):
    """A text, or a chat as the model would see it."""

    model: str
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(Strict):
    model: str
    tokens: Annotated[TokenIds, Field(max_length=MOST_IDS)]


def json_structure(schema: Any, *, param: str) -> Structure:
    """The structure of a JSON schema. Raises `ApiError` when it is too large to compile in reasonable time."""
    text = json.dumps(schema)
    too_long = f"The schema is longer than {STRUCTURE_LIMIT_CHARS} characters"
    if why := too_long if len(text) > STRUCTURE_LIMIT_CHARS else schema_objection(schema):
        raise bad_request(why, param=param)
    return Structure("json_schema", text)


R = TypeVar("R", bound=BaseModel)


def parse(kind: type[R], body: bytes) -> R:
    """The request in `body`. Raises `ApiError` (400) that names the first thing that is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        told = max(
            (one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]),
            key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])),  # of several forms the nearest one
        )
        path = ".".join(str(step) for step in told["loc"] if not UNION_STEP.match(str(step)))
        message = told["msg"].removeprefix("Value error, ")
        raise bad_request(f"{path}: {message}" if path else message, param=path or None) from None
