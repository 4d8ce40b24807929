"""What a program is told: one frozen, validated class for each, read from a YAML file and `key=value` words.

A wrong key or value is refused with its line in the file and the nearest thing that works.
"""

import argparse
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import Refused
from trainer.files import digest_of


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def digest(self) -> str:
        return digest_of(self.model_dump(mode="json"))


class StdlibSource(Config):
    """The Python standard library's own source, which is wherever Python is."""

    kind: Literal["python-stdlib"]


class TextSource(Config):
    """UTF-8 files under a directory or any fsspec URL; one file is one document."""

    kind: Literal["text"]
    path: str
    glob: str = "**/*.txt"


class DataConfig(Config):
    source: Annotated[StdlibSource | TextSource, Field(discriminator="kind")]
    vocab_size: int = Field(default=1024, ge=257, le=1 << 20)  # 256 bytes and the end of text
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    seed: int = 0


class ModelConfig(Config):
    """The shape of a Llama-family decoder; the size of the vocabulary comes with the dataset."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=2)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    ffn: int = Field(ge=1)
    max_context: int = Field(ge=2)
    tied_embeddings: bool = True
    rope_theta: float = Field(default=10_000.0, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden // self.heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.hidden % self.heads:  # with a head_dim of its own too: Transformers opens no other
            fits = [heads for heads in range(1, self.hidden + 1) if self.hidden % heads == 0]
            raise ValueError(
                f"hidden {self.hidden} does not divide by heads {self.heads}; {_nearest(self.heads, fits)}"
            )
        if self.head_width % 2:
            raise ValueError(f"the width of a head, {self.head_width}, must be even: RoPE turns pairs")
        if self.heads % self.kv_heads:
            fits = [heads for heads in range(1, self.heads + 1) if self.heads % heads == 0]
            raise ValueError(
                f"kv_heads {self.kv_heads} must divide heads {self.heads}; {_nearest(self.kv_heads, fits)}"
            )
        return self


class OptimConfig(Config):
    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    grad_clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _in_range(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; the cosine only falls")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must each be at least 0 and below 1")
        return self


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)


class TrainConfig(Config):
    model: ModelConfig
    seq: int = Field(ge=2)
    global_batch: int = Field(ge=1)  # sequences a step, over all ranks
    micro_batch: int = Field(ge=1)  # sequences at once on one rank
    steps: int = Field(ge=1)
    optim: OptimConfig
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _context_fits(self) -> "TrainConfig":
        if self.seq > self.model.max_context:
            raise ValueError(
                f"seq {self.seq} is longer than model.max_context {self.model.max_context}; "
                f"set seq to {self.model.max_context} or max_context to {self.seq}"
            )
        return self

    def grad_accum(self, world: int) -> int:
        """Micro-batches that each of `world` ranks adds up for one step. Raises Refused when that is not whole."""
        share = self.micro_batch * world
        if self.global_batch % share == 0:
            return self.global_batch // share
        below = self.global_batch // share * share
        near = [batch for batch in (below, below + share) if batch]
        micro = [n for n in range(1, self.micro_batch + 1) if self.global_batch % (n * world) == 0]
        other = f", or micro_batch to {micro[-1]}" if micro else ""
        raise Refused(
            f"global_batch {self.global_batch} does not divide by micro_batch {self.micro_batch} x {world} ranks",
            where="global_batch",
            fix=f"Set global_batch to {' or '.join(map(str, near))}{other}.",
        )

    def run_digest(self) -> str:
        """Of all that decides the trained weights: how often a run logs or saves does not."""
        return digest_of(self.model_dump(mode="json", exclude={"checkpoint", "log_every_steps"}))


class SampleConfig(Config):
    prompt: str = "def "
    max_tokens: int = Field(default=64, ge=0)


Baseline = Literal["unigram", "trigram", "kneser_ney_5"]


class EvaluateConfig(Config):
    max_tokens: int = Field(default=100_000, ge=2)  # of the held-out text
    baselines: tuple[Baseline, ...] = ("unigram", "trigram", "kneser_ney_5")
    sample: SampleConfig = SampleConfig()


class GateConfig(Config):
    must_beat: Baseline | None = "trigram"
    max_bits_per_byte: float | None = Field(default=None, gt=0)


class PublishConfig(Config):
    gate: GateConfig = GateConfig()


def _nearest(value: int, fits: Sequence[int]) -> str:
    near = sorted(sorted(fits, key=lambda fit: abs(fit - value))[:2])
    return f"the nearest that fit are {' and '.join(map(str, near))}"


# Reading a command: --config FILE key=value …

C = TypeVar("C", bound=Config)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(
            message, where="command line", fix=f"Usage: {self.format_usage().removeprefix('usage: ').strip()}"
        )


def read_command(
    program: str, config_class: type[C], *, places: tuple[str, ...], arguments: Sequence[str]
) -> tuple[C, dict[str, str]]:
    """The validated config, and the places (`data=DIR`, …): what a config file never holds. All places are required.

    Raises Refused for anything that is unknown, missing or ill-typed.
    """
    usage = f"python -m {program} --config FILE {' '.join(f'{place}=…' for place in places)} [key=value …]"
    parser = _Parser(prog=f"python -m {program}", usage=usage, add_help=True, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", type=Path)
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(list(arguments))
    given, overrides = {}, {}
    for word in options.words:
        key, equals, value = word.partition("=")
        if not equals:
            raise Refused(f"'{word}' is not of the form key=value", where="command line", fix=f"Usage: {usage}")
        (given if key in places else overrides)[key] = value
    for place in places:
        if not given.get(place):
            raise Refused(f"{place}= is missing", where="command line", fix=f"Usage: {usage}")
    return load_config(config_class, options.config, overrides), given


def load_config(config_class: type[C], path: Path, overrides: dict[str, str]) -> C:
    """Reads a YAML file, lays `{"optim.lr": "1e-3"}` over it and validates the whole."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise Refused(
            f"cannot read the config: {error.strerror}", where=str(path), fix="Name an existing file."
        ) from None
    except UnicodeDecodeError:
        raise Refused("the config is not UTF-8 text", where=str(path), fix="Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise Refused(f"the config is not YAML: {problem}", where=where, fix="Mend that line.") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise Refused("the config is not a mapping of keys", where=str(path), fix="Write lines of the form key: value.")
    for key, text in overrides.items():
        _lay_over(values, key, text)
    try:
        return config_class.model_validate(values)
    except ValidationError as errors:
        raise _explain(errors, config_class, path=path, tree=tree, overrides=overrides) from None


def _lay_over(values: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inside = values.setdefault(parent, {})
        if not isinstance(inside, dict):
            raise Refused(f"'{parent}' holds no keys", where=f"command line: {key}", fix=f"Remove {key}=….")
        values = inside
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise Refused(f"'{text}' is not a value", where=f"command line: {key}", fix="Quote it.") from None


def _explain(
    errors: ValidationError, config_class: type[Config], *, path: Path, tree: Any, overrides: dict[str, str]
) -> Refused:
    """The first error as one sentence. Unknown keys go first: a misspelt key also makes the right one missing."""
    found = errors.errors(include_url=False)
    error = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    keys, known = _walk(config_class, error["loc"])
    dotted = ".".join(map(str, keys))
    where = f"command line: {dotted}" if dotted in overrides else f"{path}:{_line(tree, keys)}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
        fix = f"Did you mean '{near[0]}'?" if near else f"Known keys here: {', '.join(known)}."
        return Refused(f"unknown key '{dotted}'", where=where, fix=fix)
    if error["type"] == "missing":
        return Refused(f"'{dotted}' is missing", where=where, fix=f"Add {keys[-1]}: to it.")
    message = error["msg"].removeprefix("Value error, ")
    subject = f"'{dotted}': " if dotted and error["type"] != "value_error" else ""
    return Refused(f"{subject}{message[0].lower()}{message[1:]}", where=where, fix="Change the value and try again.")


def _walk(config_class: type[Config], location: Sequence[str | int]) -> tuple[list[str | int], list[str]]:
    """The keys of a pydantic location without its union tags, and the keys that are known where it ends."""
    keys: list[str | int] = []
    inside: list[type[Config]] = [config_class]
    for part in location:
        tagged = [one for one in inside if part in _tags(one)]
        if tagged:
            inside = tagged
            continue
        known = [name for one in inside for name in one.model_fields]
        keys.append(part)
        fields = [one.model_fields[part] for one in inside if part in one.model_fields]
        inside = [found for field in fields for found in _config_classes(field.annotation)]
        if not inside:
            return keys, known
    return keys, [name for one in inside for name in one.model_fields]


def _tags(config_class: type[Config]) -> tuple[Any, ...]:
    kind = config_class.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _config_classes(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Config) else []
    return [found for inner in typing.get_args(annotation) for found in _config_classes(inner)]


def _line(node: Any, keys: Sequence[str | int]) -> int:
    """The line of the innermost of `keys` that the file has."""
    line = node.start_mark.line + 1 if node is not None else 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pair = next(((name, value) for name, value in node.value if name.value == key), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
    return line
