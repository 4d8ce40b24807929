"""Reading a command: `--config FILE key=value …` into a validated config and the places it names.

A wrong key or value is refused with its line in the file and the nearest thing that works.
"""

import difflib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from trainer.config import Config, TrainConfig
from trainer.errors import Parser, Refused

C = TypeVar("C", bound=Config)


def read_command(
    program: str,
    config_class: type[C],
    *,
    places: tuple[str, ...],
    arguments: Sequence[str],
    optional: tuple[str, ...] = (),
    complete: Callable[[dict[str, str]], dict[str, Any]] = lambda _given: {},
) -> tuple[C, dict[str, str]]:
    """The validated config, and the places (`data=DIR`, …): what a config file never holds. All `places` are required.
    `complete` gives, from the places, keys that the file then need not have.

    Raises Refused for anything that is unknown, missing or ill-typed.
    """
    words = [*(f"{place}=…" for place in places), *(f"[{place}=…]" for place in optional), "[key=value …]"]
    usage = f"python -m {program} --config FILE {' '.join(words)}"
    parser = Parser(prog=f"python -m {program}", usage=usage, add_help=True, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", type=Path)
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(list(arguments))
    given, overrides = {}, {}
    for word in options.words:
        key, equals, value = word.partition("=")
        if not equals:
            raise Refused(f"'{word}' is not of the form key=value", where="command line", fix=f"Usage: {usage}")
        (given if key in (*places, *optional) else overrides)[key] = value
    for place in places:
        if not given.get(place):
            raise Refused(f"{place}= is missing", where="command line", fix=f"Usage: {usage}")
    return load_config(config_class, options.config, overrides, complete(given)), given


def read_train_command(arguments: Sequence[str]) -> tuple[TrainConfig, dict[str, str]]:
    """The trainer's own command; with base=DIR the shape of the model is that of the package there."""

    def shape_of_base(places: dict[str, str]) -> dict[str, Any]:
        if "base" not in places:
            return {}
        from trainer.shapes import read_settings, shape_of

        return {"model": shape_of(read_settings(Path(places["base"])), where=places["base"])}

    return read_command(
        "trainer",
        TrainConfig,
        places=("data", "run"),
        optional=("base", "checkpoints"),
        arguments=arguments,
        complete=shape_of_base,
    )


def load_config(config_class: type[C], path: Path, overrides: dict[str, str], known: dict[str, Any] | None = None) -> C:
    """Reads a YAML file, lays `{"optim.lr": "1e-3"}` over it and validates the whole.

    `known` are keys with their values that the file leaves out. Raises Refused where it says otherwise.
    """
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
    except RecursionError:
        raise Refused("the config is nested too deeply", where=str(path), fix="Write it flatter.") from None
    _refuse_repeated(tree, path, met=set())
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise Refused("the config is not a mapping of keys", where=str(path), fix="Write lines of the form key: value.")
    for key, value in (known or {}).items():
        if values.setdefault(key, value) != value:
            fix = f"Remove {key}: it is the package's."
            raise Refused(f"'{key}' is not what base= says", where=f"{path}:{_line(tree, [key])}", fix=fix)
    for key, text in overrides.items():
        _lay_over(values, key, text)
    try:
        return config_class.model_validate(values)
    except ValidationError as errors:
        raise _explain(errors, config_class, path=path, tree=tree, overrides=overrides) from None


def _refuse_repeated(node: Any, path: Path, *, met: set[int]) -> None:
    """YAML takes the last of two equal keys, and the first would be ignored. What an alias names again was `met`."""
    if id(node) in met:
        return
    met.add(id(node))
    seen: set[str] = set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(node, yaml.MappingNode):
            key, child = child
            if key.value in seen:
                where = f"{path}:{key.start_mark.line + 1}"
                raise Refused(f"'{key.value}' is there twice", where=where, fix="Remove one of them.")
            seen.add(key.value)
        _refuse_repeated(child, path, met=met)


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
        if isinstance(part, int):  # the number of an item: its keys are those of its list
            keys.append(part)
            continue
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
