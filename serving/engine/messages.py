"""What the server and its engine process say to each other: plain tuples, cheap to pickle, typed on both sides."""

from typing import NamedTuple

from serving.settings import Settings


class SamplingParams(NamedTuple):
    """How to answer one prompt. Validated where it enters (the API); `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to report beside each token; None: report nothing
    prompt_logprobs: bool = False


class Load(NamedTuple):
    root: str
    settings: Settings


class Add(NamedTuple):
    seq_id: int
    prompt_ids: list[int]
    params: SamplingParams
    arrived_s: float  # CLOCK_MONOTONIC, which all processes of a machine share


class Abort(NamedTuple):
    seq_ids: list[int]


class Stop(NamedTuple):
    pass


Request = Load | Add | Abort | Stop


class Loading(NamedTuple):
    done_bytes: int
    total_bytes: int


class Ready(NamedTuple):
    """Sent once a token was made."""

    max_model_len: int
    vocab_size: int
    kv_blocks: int
    seconds: float


class Failed(NamedTuple):
    message: str
    refused: bool  # true: another try would fail in the same way


class TokenLogprob(NamedTuple):
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely first
    offset: int  # characters of the answer before this token


class Output(NamedTuple):
    """What one step added to one sequence."""

    seq_id: int
    text: str
    num_tokens: int  # of the answer so far, also those whose text is held or was cut by a stop string
    finish_reason: str | None = None  # stop, length
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    queue_s: float | None = None  # in a sequence's first output: how long it waited to be scheduled


class Step(NamedTuple):
    outputs: list[Output]
    running: int
    waiting: int
    kv_used_ratio: float


Reply = Loading | Ready | Failed | Step
