"""How many tokens of prompts a step may take while others decode, learnt from how long steps take.

A decoding step waits for the weights, and each prompt token adds arithmetic: seconds = decode + tokens × token. A chunk
is as long as makes the step `STRETCH` times one that only decodes, so that a long prompt slows the others' tokens by no
more, and is itself never stopped. Where more sequences wait for their first token than would be held up, the step is
as long as it may be: those who wait are then the many.
"""

STRETCH = 2.25  # below the 3 that is promised of the 99th percentile: times scatter, and attention grows along a prompt
LEAST_TOKENS = 16
KEPT = 0.9  # of what was learnt before, at each step


class Pace:
    def __init__(self) -> None:
        self.decode_s: float | None = None
        self.token_s: float | None = None

    def learn(self, *, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """One step's time, with what it computed."""
        if prompt_tokens == 0:
            self.decode_s = _mix(self.decode_s, seconds)
        elif decodes == 0:
            self.token_s = _mix(self.token_s, seconds / prompt_tokens)
        elif self.token_s is None or self.decode_s is None:
            # Two unknowns and one time: until a step of one kind tells them apart, every token is taken to cost the same.
            each_s = seconds / (decodes + prompt_tokens)
            self.token_s = each_s if self.token_s is None else self.token_s
            self.decode_s = max(seconds - prompt_tokens * self.token_s, decodes * each_s)
        else:
            rest_s = max(seconds - self._decode_s(decodes), 0.1 * seconds)
            self.token_s = _mix(self.token_s, rest_s / prompt_tokens)

    def prompt_tokens(self, *, decoding: int, first_tokens: int, most: int) -> int:
        """Of the next step, where `decoding` sequences would wait for it and `first_tokens` others for their first."""
        if decoding < max(first_tokens, 1) or self.token_s is None or self.decode_s is None:
            return most
        return min(most, max(LEAST_TOKENS, int((STRETCH - 1) * self._decode_s(decoding) / self.token_s)))

    def _decode_s(self, decoding: int) -> float:
        """Many at once cost their arithmetic, few the weights' way through memory."""
        assert self.decode_s is not None
        assert self.token_s is not None
        return max(self.decode_s, decoding * self.token_s)


def _mix(old: float | None, new: float) -> float:
    return new if old is None else KEPT * old + (1 - KEPT) * new
