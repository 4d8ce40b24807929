"""Tokens in, sendable text out: incremental detokenisation and stop strings, for one answer.

What is sent can't be taken back, so text is held while a later token may still change it (part of a character)
or cut it (part of a stop string). Everything sent, joined, is the whole decode up to the first stop string.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what decoders write for bytes that are not, or not yet, a character


class Detokenizer:
    """`push` returns the text that is final; `flush` the rest. Joined: `decode` of all the ids.

    Decoding is local but not per token: a character may span tokens and some decoders treat the first token of a
    string apart. So a short window is decoded, which starts at the last place where the text was whole.
    (SentencePiece's byte fallback may rewrite a character when a bad byte follows; no stream can undo that.)
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0  # tokens of the window whose text has been returned, kept for the decoder's sake
        self._returned = 0  # characters of the window's text that have been returned
        self.unfinished = 0  # characters that the window ends with and that may still change

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(UNFINISHED) if text.endswith(UNFINISHED) else text
        self.unfinished = len(text) - len(whole)
        new = whole[self._returned :]
        self._returned = max(self._returned, len(whole))
        if new and len(whole) == len(text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._returned = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        text = self._decode(self._window)[self._returned :]
        self._returned += len(text)
        return text


class TextStream:
    """Detokenised text with stop strings taken out. `emitted` counts the characters given out so far."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = tuple(stop)
        self._held = ""
        self.emitted = 0
        self._decoded = 0
        self.stopped = False

    @property
    def position(self) -> int:
        """Where the next token's text begins: the characters decoded so far, given out or held."""
        return self._decoded + self._detokenizer.unfinished

    def push(self, token_id: int) -> str:
        """The text that this token made final. After a stop string is met, `stopped` is true and nothing follows."""
        return self._release(self._detokenizer.push(token_id), last=False)

    def flush(self) -> str:
        """What was still held when the answer ended."""
        return self._release(self._detokenizer.flush(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._decoded += len(text)
        if self._stop:
            text = self._held + text
            found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
            if found:
                self.stopped, self._held, text = True, "", text[: min(found)]
            else:
                keep = 0 if last else self._held_back(text)
                text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.emitted += len(text)
        return text

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
