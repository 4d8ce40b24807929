"""A stack file means the same to every reader, or is refused with its line."""

from contextlib import suppress

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from infra.spec.document import MOST_VALUES, DocumentError, Dumper, read_document

BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("1e-3", 1e-3),
        ("4e4", 4e4),
        ("2026-11-21", "2026-11-21"),
        ("1:30", "1:30"),
        ("0x1F", 31),
        ("1_000", 1000),
        ("-.5", -0.5),
        ("~", None),
        ("'1'", "1"),
    ],
)
def test_values_are_those_of_the_engine(text: str, value: object) -> None:
    found = read_document(f"a: {text}").values["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", 5, "key `c` is there twice, first on line 3"),
        ("a:\n\tb: 1\n", 2, "use spaces"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\nb: *nope\n", 2, "undefined alias 'nope'"),
        ("a: 1\nb: &x {c: *x}\n", 2, "within its own anchor"),
        ("a: 1\nb: !!python/object/apply:os.getpid []\n", 2, "constructor"),
        ("a: 1\nb: x\0y\n", 2, "'\\x00'"),
        ("a: 0x_\n", 1, "cannot be read"),
        (BILLION, 1, f"more than {MOST_VALUES:,} values"),
        ("[" * 1000, 1, "nested too deep"),
    ],
)
def test_what_readers_take_differently_is_refused_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read_document(text)
    assert says in str(caught.value)
    assert caught.value.line == line


def test_merged_keys_have_the_line_of_their_anchor() -> None:
    document = read_document("base: &base {x: 1, y: 2}\nown:\n  <<: *base\n  y: 3\n")
    assert document.values["own"] == {"x": 1, "y": 3}
    assert document.lines["own", "x"] == 1


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(value=plain)
@example(value={"0E0": "1e3"})
def test_what_is_written_is_read(value: object) -> None:
    assert read_document(yaml.dump(value, Dumper=Dumper)).values == value


@given(text=st.text(alphabet="abc:-[]{}&*!?|>'\"#%@,\n\t <~0189.e_", max_size=60))
def test_any_text_is_a_document_or_refused(text: str) -> None:
    with suppress(DocumentError):
        read_document(text)
