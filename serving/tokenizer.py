"""Text to token ids and back: a thin face on `tokenizers`, with the facts that serving needs from a package."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from serving.errors import Refused


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte → the byte. Every byte-level BPE spells its tokens with these."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHARS_PER_TOKEN = 4  # about as many as text has; only time depends on it


class Tokenizer:
    def __init__(self, root: Path) -> None:
        """Reads a package's `tokenizer.json`. Raises `Refused` when it is missing or broken."""
        path = root / "tokenizer.json"
        try:
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Refused(
                "tokenizer.json is missing", where=str(path), fix="Give a package in Hugging Face layout"
            ) from None
        except Exception as error:  # `tokenizers` raises plain Exceptions
            raise Refused(
                f"the tokenizer cannot be read: {error}", where=str(path), fix="Export the model again"
            ) from None
        # A prompt is what the client sent: whatever cutting and padding the trainer had set must not touch it.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.longest_token_bytes = max((len(token.encode()) for token in vocab), default=1)
        self.eos_ids = _eos_ids(root, vocab)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; `special` lets the package's own post-processing add its begin-of-text token."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def encode_at_most(self, text: str, most: int, *, special: bool) -> list[int] | None:
        """Ids of `text`; None when there are more than `most`, which its beginning tells before the whole is read."""
        chars = CHARS_PER_TOKEN * most
        while chars < len(text):
            # Where the beginning is cut a word may fall into more tokens than it has as a whole, by its bytes at most.
            if len(self.encode(text[:chars], special=special)) > most + self.longest_token_bytes:
                return None
            chars *= 2
        ids = self.encode(text, special=special)
        return ids if len(ids) <= most else None

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: exact for byte-level vocabularies, its text's UTF-8 for others."""
        token = self._backend.id_to_token(token_id) or ""
        if self._byte_level and all(char in BYTE_OF for char in token):
            return bytes(BYTE_OF[char] for char in token)
        if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback
            return bytes([int(token[3:5], 16)])
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def _eos_ids(root: Path, vocab: dict[str, int]) -> frozenset[int]:
    """The tokens that end an answer, as the package says: its generation config, else its model or tokenizer config."""
    for name, key in (("generation_config", "eos_token_id"), ("config", "eos_token_id")):
        found = read_json(root / f"{name}.json").get(key)
        ids = [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]
        if ids:
            return frozenset(ids)
    token = read_json(root / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return frozenset({vocab[text]}) if text in vocab else frozenset()


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON file of a package: empty when it is not there. Raises `Refused` when it is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused("the file is no JSON object", where=str(path), fix="Export the model again")
    return value
