"""What is wrong with a value, in the words of a stack file and not in those of the library that found it."""

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

from infra.spec.base import NAME_PATTERN

LONGEST = 60
"""Characters of a value that a message repeats."""
NAME = "lower-case letters, digits and dashes, from a letter to a letter or digit, at most 40"


def say(error: Mapping[str, Any], *, known: Sequence[str]) -> str:
    """One of pydantic's errors; `known` are the keys that can stand beside the one that is wrong."""
    kind, wrong, context = str(error["type"]), error["input"], cast(dict[str, Any], error.get("ctx") or {})
    match kind:
        case "extra_forbidden":
            near = get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
            return "unknown key; " + (f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}")
        case "missing":
            return "this key is required and not there"
        case "value_error":
            return str(context["error"])
        case "union_tag_not_found":
            return f"{_key(context)} is required and not there; it says which keys the others are"
        case "union_tag_invalid":
            tags = [tag.strip("'") for tag in str(context["expected_tags"]).split(", ")]
            return f"{_key(context)} {shown(context['tag'])} does not exist; {_meant(str(context['tag']), tags)}"
        case "literal_error":
            return _choice(wrong, str(context["expected"]))
        case _:
            wanted = WANTED.get(kind)
            return f"{wanted(context) if wanted else error['msg']}, and it is {shown(wrong)}"


WANTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), lambda _: "must be a whole number"),
    "int_parsing_size": lambda _: "must be at most 1099511627776",
    **dict.fromkeys(("float_type", "float_parsing"), lambda _: "must be a number"),
    "finite_number": lambda _: "must be a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), lambda _: "must be true or false"),
    "string_type": lambda _: "must be text; put it in quotes where YAML takes it for something else",
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), lambda _: "must be keys with values"),
    **dict.fromkeys(("tuple_type", "list_type"), lambda _: "must be a list, as [a, b]"),
    "greater_than": lambda given: f"must be above {given['gt']:g}",
    "greater_than_equal": lambda given: f"must be at least {_number(given['ge'])}",
    "less_than": lambda given: f"must be below {given['lt']:g}",
    "less_than_equal": lambda given: f"must be at most {_number(given['le'])}",
    "too_short": lambda given: f"must have {given['min_length']} or more items",
    "too_long": lambda given: f"must have {given['max_length']} items or fewer",
    "string_too_short": lambda _: "must not be empty",
    "string_pattern_mismatch": lambda given: (
        f"must be {NAME}" if given["pattern"] == NAME_PATTERN else f"must match {given['pattern']}"
    ),
    "invalid_key": lambda _: "a key must be text",
}


def shown(value: Any) -> str:
    """A value as a stack file would have it, cut to what a line has room for."""
    text = json.dumps(value, ensure_ascii=False, default=str) if _small(value) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _small(value: Any) -> bool:
    return not isinstance(value, str | list | dict) or len(cast("list[Any]", value)) < LONGEST


def _key(context: Mapping[str, Any]) -> str:
    return f"`{str(context['discriminator']).strip(chr(39))}`"


def _choice(wrong: Any, expected: str) -> str:
    """`expected` is pydantic's `'a', 'b' or 'c'`."""
    choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
    if choices == ["auto"]:
        return f"must be `auto` or a value, and it is {shown(wrong)}"
    return f"{shown(wrong)} is no choice; {_meant(str(wrong), choices)}"


def _meant(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"there is {', '.join(known)}"
