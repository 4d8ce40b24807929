"""What a structure would cost, judged by its text: one that is hostile is refused before anything is compiled.

A count in braces writes what it stands behind so many times, and counts in counts multiply: `(a{1000}){1000}` is eleven
characters and a million states. What cannot be seen from the text is bounded where it is compiled (engine/structure.py).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

MOST_STATES = 20_000  # of an expression with its counts written out
MOST_DEPTH = 64  # of a schema's parts in parts, or of an expression's brackets
COUNT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
LARK_REGEX = re.compile(r"/((?:[^/\\\n]|\\.)+)/")
LARK_COUNT = re.compile(r"~\s*(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?")


def schema_objection(schema: Any) -> str:
    """Why a JSON schema is not even tried; nothing when it may be."""
    for depth, part in _parts(schema):
        if depth > MOST_DEPTH:
            return f"The schema is nested more than {MOST_DEPTH} deep"
        if isinstance(part, dict):
            named = part.get("patternProperties")
            patterns = [part.get("pattern"), *(named if isinstance(named, dict) else ())]
            if why := _first(regex_objection(pattern) for pattern in patterns if isinstance(pattern, str)):
                return why
    return ""


def grammar_objection(text: str) -> str:
    """Why a grammar in Lark is not even tried; nothing when it may be."""
    counts = [int(count) for found in LARK_COUNT.findall(text) for count in found if count]
    if max(counts, default=0) > MOST_STATES:
        return f"The grammar counts beyond {MOST_STATES}"
    return _first(map(regex_objection, LARK_REGEX.findall(text)))


def _first(objections: Iterable[str]) -> str:
    return next(filter(None, objections), "")


def _parts(schema: Any) -> Iterator[tuple[int, Any]]:
    """(depth, part) of all objects and lists of a schema, without recursion."""
    open_parts = [(1, schema)]
    while open_parts:
        depth, part = open_parts.pop()
        yield depth, part
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        open_parts += [(depth + 1, value) for value in inner if isinstance(value, dict | list)]


def regex_objection(pattern: str) -> str:
    """Counts an expression's states with its counts written out. What is no expression passes: compiling it says why."""
    sizes, last, at = [0], 0, 0  # of the brackets that are open; of what a count would stand behind
    while at < len(pattern):
        char, step = pattern[at], 1
        if char == "(":
            sizes.append(0)
            if len(sizes) > MOST_DEPTH:
                return f"The expression is nested more than {MOST_DEPTH} deep"
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif char == "{" and (count := COUNT.match(pattern, at)):
            step = len(count[0])
            times = max(1, int(count[1]), int(count[2] or 0))
            sizes[-1] += last * (times - 1)
            last *= times
        elif char not in "|*+?^$":
            step = _class_end(pattern, at) - at if char == "[" else 2 if char == "\\" else 1
            sizes[-1] += 1
            last = 1
        if sizes[-1] > MOST_STATES:
            return f"The expression has more than {MOST_STATES} states when its counts are written out"
        at += step
    return ""


def _class_end(pattern: str, start: int) -> int:
    """Where the class that begins with a bracket at `start` has ended."""
    at = start + 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
