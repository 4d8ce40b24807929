"""Guesses the next tokens from the text so far, to be checked in one step: a decoding step of one sequence waits for the
weights, not for arithmetic, so a few positions cost little more than one. What is drawn decides: a guess is kept only
where it is the token that would have been drawn without it, so answers do not change.

(Prompt lookup decoding, as in vLLM's and Transformers' n-gram speculation.)
"""

from array import array

from serving.engine.sequence import Sequence

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that are looked for earlier in it
SEARCHED = 4096  # tokens
BUSY = 4  # sequences: from here on they share the weights' way through memory among themselves


class NgramSpeculator:
    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def guess(self, seq: Sequence, *, running: int) -> list[int]:
        """Tokens that may follow; fewer than the answer has left, and none where a draw depends on more than its logits."""
        p = seq.params
        count = min(self.max_tokens, p.max_tokens - seq.num_output - 1)
        if count <= 0 or running >= BUSY or seq.penalised or seq.matcher is not None or p.logprobs is not None:
            return []
        return follow(seq.token_ids[-SEARCHED:], count)


def follow(tokens: list[int], count: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest end of `tokens` that has one."""
    text = array("I", tokens)
    raw, width = text.tobytes(), text.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        end, stop = raw[-length * width :], len(raw) - width
        while (at := raw.rfind(end, 0, stop)) >= 0:
            if at % width == 0:
                start = at // width + length
                return tokens[start : start + count]
            stop = at + len(end) - 1
    return []
