"""`POST /v1/embeddings`, and `/v1/tokenize` and `/v1/detokenize`: text to numbers and back."""

import base64
import math
from array import array
from typing import Any

from serving.api.chat import chat_ids
from serving.api.context import Caller, Context
from serving.api.errors import bad_request
from serving.api.generation import Generation, check_ids, encode, prompt_ids, room, served_model
from serving.api.protocol import DetokenizeRequest, EmbeddingRequest, TokenizeRequest, each
from serving.engine.messages import SamplingParams


class Embeddings:
    """One request's vectors, each of unit length."""

    def __init__(self, request: EmbeddingRequest, generation: Generation, count: int) -> None:
        self.request, self.generation, self.count = request, generation, count
        self.head = {"object": "list", "model": generation.served.name}

    @classmethod
    async def start(cls, context: Context, body: EmbeddingRequest, caller: Caller) -> "Embeddings":
        served = served_model(context, body.model)
        prompts = [await prompt_ids(served, text, param="input") for text in each(body.input)]
        for ids in prompts:
            room(served, ids, 0)
        params = SamplingParams(max_tokens=0, temperature=0.0, embed=True)
        generation = Generation(
            context, caller, served, [(ids, params) for ids in prompts], usage_prompt_tokens=sum(map(len, prompts))
        )
        return cls(body, generation, len(prompts))

    async def whole(self) -> dict[str, Any]:
        vectors: list[tuple[float, ...]] = [()] * self.count
        async for outputs in self.generation:
            for index, output in outputs:
                assert output.embedding is not None
                vectors[index] = output.embedding
        data = [{"object": "embedding", "index": i, "embedding": self._encode(v)} for i, v in enumerate(vectors)]
        tokens = self.generation.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {**self.head, "data": data, "usage": usage}

    def _encode(self, vector: tuple[float, ...]) -> list[float] | str:
        """Cut to `dimensions` and of unit length again, as numbers or as base64 of little-endian float32."""
        wanted = self.request.dimensions
        if wanted is not None and wanted != len(vector):
            if wanted > len(vector):
                raise bad_request(f"This model's embeddings have {len(vector)} dimensions", param="dimensions")
            vector = vector[:wanted]
            length = math.hypot(*vector) or 1.0
            vector = tuple(value / length for value in vector)
        if self.request.encoding_format != "base64":
            return list(vector)
        return base64.b64encode(array("f", vector).tobytes()).decode()


async def tokenize(context: Context, body: TokenizeRequest) -> dict[str, Any]:
    served = served_model(context, body.model)
    if body.messages is not None:
        ids = await chat_ids(served, body.messages, [])
    else:
        ids = await encode(served, body.prompt or "", special=body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.max_model_len}


async def detokenize(context: Context, body: DetokenizeRequest) -> dict[str, Any]:
    served = served_model(context, body.model)
    check_ids(served, body.tokens, param="tokens")
    return {"prompt": served.tokenizer.decode(body.tokens)}
