"""Carries blocks between the engine's memory and a store: out when they are given up (or shared), in when they are met."""

import hashlib
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch

from serving.cache import BlockStore
from serving.engine.attention import Pool


class Spill:
    """One model's blocks in a store. A block's bytes are all of its layers', one after another."""

    def __init__(self, store: BlockStore, pool: Pool, *, num_blocks: int, namespace: bytes) -> None:
        self.store, self._namespace = store, namespace
        # A view of each layer as blocks × bytes, whatever the pool's own shape is.
        self._layers = [layer.view(num_blocks, -1).view(torch.uint8) for layer in pool.layers]
        self.block_bytes = sum(layer.shape[1] for layer in self._layers)

    def save(self, key: bytes, block: int) -> None:
        content = torch.cat([layer[block] for layer in self._layers]).cpu()
        self.store.put(self._namespace + key, content.numpy().tobytes())

    def find(self, keys: Seq[bytes]) -> list[bytes]:
        """The contents of the first of these blocks, up to the first that the store does not have whole."""
        found = self.store.get_first([self._namespace + key for key in keys])
        for index, content in enumerate(found):
            if len(content) != self.block_bytes:
                return found[:index]
        return found

    def load(self, content: bytes, block: int) -> None:
        start = 0
        values = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        for layer in self._layers:
            stop = start + layer.shape[1]
            layer[block] = values[start:stop].to(layer.device)
            start = stop


def namespace(root: Path, *, layout: str) -> bytes:
    """What a block's bytes depend on beside its tokens: the model's content, and how the engine lays blocks out."""
    digest = hashlib.sha256(layout.encode())
    manifest = root / "manifest.json"  # of a registry's package: it holds the sha256 of every file
    weights = sorted([*root.glob("*.safetensors"), *root.glob("**/*.onnx")])
    for path in [manifest] if manifest.is_file() else [root / "config.json", *weights]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()
