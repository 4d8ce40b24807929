"""What the server and its engine process say to each other: plain tuples, cheap to pickle, typed on both sides."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from serving.settings import Settings


class Structure(NamedTuple):
    """A form that the whole answer must have. `text` is a JSON schema, a regular expression, or a grammar in Lark."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str


class SamplingParams(NamedTuple):
    """How to answer one prompt. Validated where it enters (the API); `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are left out
    presence_penalty: float = 0.0  # OpenAI's: taken from the logit of each token that the answer holds …
    frequency_penalty: float = 0.0  # … and as often as it holds it
    repetition_penalty: float = 1.0  # CTRL's (arXiv 1909.05858): on tokens of the prompt too
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    structure: Structure | None = None
    embed: bool = False  # answer with the prompt's embedding; `max_tokens` is 0
    logprobs: int | None = None  # alternatives to report beside each token; None: report nothing
    prompt_logprobs: bool = False


class AdapterRef(NamedTuple):
    """An adapter that the server has checked. Its digest stands for its content, so that a changed file is noticed."""

    digest: str
    root: Path
    num_values: int  # what it takes in memory, in values


class Load(NamedTuple):
    root: str
    settings: Settings


class Add(NamedTuple):
    seq_id: int
    prompt_ids: list[int]
    params: SamplingParams
    arrived_s: float  # CLOCK_MONOTONIC, which all processes of a machine share
    priority: int = 0  # a higher one is admitted first
    tenant: str = ""  # within one priority, tenants take turns by the tokens they had
    adapter: AdapterRef | None = None


class Abort(NamedTuple):
    seq_ids: list[int]


class Forget(NamedTuple):
    """The adapter is served no more: its memory may go."""

    adapter: AdapterRef


class Stop(NamedTuple):
    pass


Request = Load | Add | Abort | Forget | Stop


class Loading(NamedTuple):
    done_bytes: int
    total_bytes: int


class Ready(NamedTuple):
    """Sent once a token was made."""

    max_model_len: int
    vocab_size: int


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
    # stop, length; error: refused as it stands, failed: through no fault of the client; `text` then says why
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    queue_s: float | None = None  # in a sequence's first output: how long it waited to be scheduled
    cached_tokens: int = 0  # in a sequence's first output: of its prompt, those found in the prefix cache
    cumulative_logprob: float = 0.0  # of the answer so far, when logprobs are asked for: what best_of compares
    embedding: tuple[float, ...] | None = None  # unit length


class Counters(NamedTuple):
    """What happened in the engine since it was loaded."""

    prefix_hit_tokens: int = 0  # prompt tokens found in the cache of prefixes …
    prefix_miss_tokens: int = 0  # … and those that had to be computed
    preemptions: int = 0
    aborts: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    output_tokens: int = 0
    spill_failures: int = 0  # of a store of blocks that other replicas share


class Step(NamedTuple):
    outputs: list[Output]
    running: int
    waiting: int
    kv_used_ratio: float
    counters: Counters = Counters()
    bandwidth_ratio: float = 0.0  # of the memory's, over the latest steps
    mfu_ratio: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without a look-up of its class for each output: an eighth of the time, at every step."""
        return _step, (list(map(tuple, self.outputs)), *self[1:])


def _step(outputs: list[tuple[Any, ...]], *rest: Any) -> Step:
    return Step(list(map(Output._make, outputs)), *rest)


Reply = Loading | Ready | Failed | Step
