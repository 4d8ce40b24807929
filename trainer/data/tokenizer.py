"""The tokenizer of a dataset: trained on its own text, or that of the model package which is to be tuned."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import Refused
from trainer.files import read_json

END_OF_TEXT = "<|endoftext|>"
TURN_MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What a package says of its tokenizer besides tokenizer.json, kept beside the dataset and handed on to the new package.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, marks: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2): every string has tokens and comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # a document that spells the end of text does not end there
    return tokenizer


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token id stands for, shape (vocabulary,); marks such as the end of text stand for none.

    In a byte-level vocabulary one character spells one byte; in a SentencePiece one `▁` is a space and `<0x0A>` a byte.
    """
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    marks = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if token in marks:
            continue
        if byte_level:
            lengths[index] = len(token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    return lengths


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with what a model needs to know of it."""

    tokenizer: Tokenizer
    size: int  # of the embedding, which some packages pad
    end_of_text: int
    bos: str
    eos: str
    chat_template: str | None
    files: dict[str, bytes]  # TOKENIZER_FILES and their content


def trained_vocabulary(texts: Iterable[str], *, vocab_size: int, chat: bool) -> Vocabulary:
    """A vocabulary of the texts; for chats with marks for turns and the ChatML template that uses them."""
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, marks=TURN_MARKS if chat else ())
    end = tokenizer.get_vocab()[END_OF_TEXT]
    template = CHATML if chat else None
    return Vocabulary(tokenizer, tokenizer.get_vocab_size(), end, END_OF_TEXT, END_OF_TEXT, template, {})


def vocabulary_of(package: Path) -> Vocabulary:
    """That of a model package. Raises Refused for a directory without one."""
    settings, about = (read_json(package / name) for name in ("config.json", "tokenizer_config.json"))
    if settings is None or not (package / "tokenizer.json").is_file():
        fix = "Name a directory with config.json and tokenizer.json, as Hugging Face has them."
        raise Refused("there is no model package", where=str(package), fix=fix)
    about, where = about or {}, str(package / "config.json")
    tokenizer = read_tokenizer(package / "tokenizer.json")
    size, most = settings.get("vocab_size"), max(tokenizer.get_vocab().values(), default=-1)
    if not isinstance(size, int) or size <= most:
        fix = "Put the tokenizer there that belongs to the weights."
        raise Refused(f"vocab_size {size} has no room for token {most} of tokenizer.json", where=where, fix=fix)
    ends = settings.get("eos_token_id")
    end = next(iter(ends), None) if isinstance(ends, list) else ends
    if not isinstance(end, int) or tokenizer.id_to_token(end) is None:
        fix = "Set eos_token_id in its config.json to the token that ends a text."
        raise Refused("the package has no end of text", where=where, fix=fix)
    files = {name: (package / name).read_bytes() for name in TOKENIZER_FILES if (package / name).is_file()}
    return Vocabulary(
        tokenizer,
        size,
        end,
        _content(about.get("bos_token")) or "",
        _content(about.get("eos_token")) or str(tokenizer.id_to_token(end)),
        _template(package, about),
        files,
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises Refused for a file that is absent or holds no tokenizer."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        fix = "Put the tokenizer.json there that belongs to the weights."
        raise Refused(f"cannot be read: {error}", where=str(path), fix=fix) from None


def _template(package: Path, about: dict[str, Any]) -> str | None:
    """The chat template, in a file of its own or in tokenizer_config.json: as text, or the one named `default`."""
    path, inside = package / "chat_template.jinja", about.get("chat_template")
    if not path.is_file():
        named = {each["name"]: each["template"] for each in inside} if isinstance(inside, list) else {"default": inside}
        return named.get("default")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refused("the chat template is not UTF-8", where=str(path), fix="Save it as UTF-8.") from None


def _content(token: Any) -> str | None:
    """A token as a package writes it: its text, or an object with it."""
    return token["content"] if isinstance(token, dict) else token
