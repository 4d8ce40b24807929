"""What is streamed, joined, is the whole decode up to the first stop string, and never holds half a character."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_packages import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models

from serving.text_stream import Detokenizer, TextStream

TOKENIZER = byte_level_tokenizer()


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def sentencepiece_like() -> Tokenizer:
    """Llama 2's kind: a space before the first word that decoding takes away, and bytes spelled <0xNN>."""
    pieces = ["<unk>", "▁a", "▁the", "b", "▁"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def streamed(ids: list[int], decode_all=decode) -> list[str]:
    detokenizer = Detokenizer(decode_all)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


@given(text=st.text(max_size=60))
def test_text_comes_back_whole(text: str) -> None:
    assert "".join(streamed(TOKENIZER.encode(text).ids)) == text


@given(ids=st.lists(st.integers(0, 383), max_size=60))
def test_any_tokens_stream_to_their_whole_decode(ids: list[int]) -> None:
    """Also bytes that are no text, which a random model makes all the time."""
    assert "".join(streamed(ids)) == decode(ids)


@given(text=st.text(alphabet="é世🙂a", max_size=20))
def test_no_piece_holds_half_a_character(text: str) -> None:
    pieces = streamed(TOKENIZER.encode(text).ids)
    assert all("\ufffd" not in piece for piece in pieces)


@given(words=st.lists(st.one_of(st.sampled_from([[1], [2], [3], [4]]), st.sampled_from("é世🙂")), max_size=20))
def test_a_decoder_that_looks_at_neighbours_streams_the_same(words: list) -> None:
    tokenizer = sentencepiece_like()
    ids = [i for word in words for i in (word if isinstance(word, list) else [5 + b for b in word.encode()])]
    assert "".join(streamed(ids, tokenizer.decode)) == tokenizer.decode(ids)


@given(
    text=st.text(alphabet="abc\n🙂", max_size=40),
    stop=st.lists(st.text(alphabet="abc\n🙂", min_size=1, max_size=5), max_size=4),
)
def test_the_answer_is_cut_at_the_first_stop_string(text: str, stop: list[str]) -> None:
    ids = TOKENIZER.encode(text).ids
    stream = TextStream(decode, stop)
    pieces = []
    for i in ids:
        pieces.append(stream.push(i))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    # The stop that is complete first ends the answer; of those that one token completes, the one that begins first.
    joined = "".join(pieces)
    assert text.startswith(joined)
    assert stream.stopped == any(s in text for s in stop)
    assert stream.emitted == len(joined)
    assert not any(s in joined for s in stop)
    if not stream.stopped:
        assert joined == text
    else:
        assert any(text[len(joined) :].startswith(s) for s in stop)
