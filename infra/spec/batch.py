"""What is answered without a server: a file of requests, by a Job whose pods share it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, Name, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from infra.spec.serving import WIDENED, Guesses, Quantized
from infra.spec.training import Dtype, PodResources

MOUNT_PATH = "/batch"
"""Where the volume is."""
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


class Batch(Spec):
    name: Name
    """Name of the batch."""
    input: Annotated[str, Field(min_length=1)]
    """Requests, one a line, in OpenAI's batch form: a JSONL file, a directory of them or a pattern, at any fsspec URL."""
    output: Annotated[str, Field(min_length=1)]
    """Directory or URL that `answers.jsonl`, one line for each of the input and in its order, and `summary.json` appear in."""
    endpoint: Endpoint = "/v1/chat/completions"
    """Route that the lines name."""
    model: Name
    """Name of the model: the `name` of the stack's training, or any in the registry."""
    channel: Name = "production"
    """Registry channel whose model answers; the first pod to start settles which digest that is."""
    pool: Name
    """Node pool that it runs on."""
    gpus: NonNegativeInt = 0
    """GPUs of one pod."""
    resources: PodResources
    """CPU and memory of one pod."""
    shards: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Parts of the input, each one pod's."""
    at_once: PositiveInt | None = None
    """Pods that run together; null: all."""
    max_restarts: NonNegativeInt = 6
    """Failed pods of one shard before the batch counts as failed; evictions do not count."""
    volume_claim: Name | None = None
    """PersistentVolumeClaim that is mounted at /batch, for input and output that are in no object store."""
    max_model_len: PositiveInt | None = None
    """Longest context in tokens; null: the model's."""
    max_num_seqs: PositiveInt = 32
    """Sequences that decode together."""
    kv_gib: PositiveFloat = 1.0
    """Memory of the KV cache, GiB."""
    dtype: Dtype = "auto"
    """Compute type."""
    quantize: Quantized | None = None
    """Form that the layers' weights get when they are loaded, on a CPU; null: `dtype`."""
    speculate_tokens: Guesses = 0
    """Tokens that are guessed where the text repeats itself, and checked in one step: the same answers, sooner."""

    @model_validator(mode="after")
    def _widened_on_no_gpu(self) -> Self:
        if self.quantize and self.gpus:
            raise Misplaced(WIDENED, "quantize")
        return self

    @model_validator(mode="after")
    def _answers_are_not_asked(self) -> Self:
        if self.output.rstrip("/") == self.input.rstrip("/"):
            raise Misplaced("the answers would lie among the requests; give a directory of their own", "output")
        return self

    def unseen(self) -> tuple[str, str] | None:
        """Key and path of what no pod of a cluster sees: neither a URL nor on the volume."""
        for key, url in (("input", self.input), ("output", self.output)):
            path = url.removeprefix("file://")
            if "://" not in path and not (self.volume_claim and path.startswith(f"{MOUNT_PATH}/")):
                return key, path
        return None

    @property
    def pods(self) -> int:
        """Pods that run together at most."""
        return min(self.at_once or self.shards, self.shards)
