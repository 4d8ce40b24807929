"""The command line of `python -m serving`, parsed and validated into one frozen value. Imports nothing heavy."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from serving.errors import Refused

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What a graph, which has weights of its own, can do nothing with.
NOT_ONNX = ("attention", "dtype", "quantize", "adapters", "adapters_dir", "tensor_parallel_size")
# What one process keeps for itself alone.
NOT_SPLIT = ("kv_spill", "attention")
UNITS_BYTES = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str  # a package, a Hugging Face directory, a registry entry or a channel file
    host: str = "127.0.0.1"
    port: int = 8000  # 0 picks a free one
    served_name: str | None = None
    max_model_len: int | None = None  # tokens of prompt and answer together; the model's own limit when not given
    max_num_seqs: int = 64
    max_queued_tokens: int = 65_536
    engine: str = "torch"  # torch, or onnx: the package's `model.onnx`, by ONNX Runtime
    kv_bytes: int | None = None  # for keys and values; or …
    kv_share: float | None = None  # … of the memory that is free once the weights are loaded
    kv_spill: str | None = None  # where blocks go that memory gives up: bytes, or redis://…; nowhere when not given
    dtype: str = "auto"
    quantize: str = "none"  # the layers' weights, once loaded: none, int8, int4
    speculate_tokens: int = 0  # guessed from the text so far and checked in one step; 0: none
    device: str = "auto"
    attention: str = "sdpa"  # flash: FlashAttention and CUDA graphs
    tensor_parallel_size: int = 1  # processes that share one model, on one machine
    adapters: tuple[str, ...] = ()  # NAME=SOURCE: a directory in PEFT's layout, a registry entry or a channel file
    adapters_dir: str | None = None  # each directory in it is an adapter, by its own name
    max_adapters: int = 8  # in memory at once, …
    adapter_bytes: int = 1 << 30  # … and the memory of all of them
    peak_bytes_per_s: float | None = None  # of the memory; measured at start when not given
    peak_flops_per_s: float | None = None
    linger_s: float = 0.0  # once told to end: unready, and answering still, until routers have heard of it
    drain_s: float = 30.0  # and then: refusing, until what was accepted is answered
    poll_s: float = 2.0
    max_request_s: float = 3600.0  # the longest that any request may take, whatever its client would wait
    min_free_bytes: int = 64 << 20  # below this much free memory new requests are refused
    api_keys: str | None = None  # a file of hashed keys; without it everyone may ask
    session_store: str | None = None  # redis://…; sessions are kept in memory when not given
    files_dir: str | None = None  # where files and batches are kept; without it there are none
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # 0 picks a free one; no admin port when not given


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in the project's form: one line, with the fix."""

    def error(self, message: str) -> NoReturn:
        raise Refused(message, where="command line", fix=f"See `{self.prog} --help`")


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no size in bytes, such as 1073741824 or 1GiB")
    return _positive(int(float(match[1]) * UNITS_BYTES[match[2] or ""]), text)


def _spill(text: str) -> str:
    return text if text.startswith(("redis://", "rediss://", "unix://")) else str(parse_bytes(text))


def _positive(value: int, text: str) -> int:
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be above 0")
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return _positive(int(text), text)


def _rate(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?([eE]\+?\d{1,2})?", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no rate above 0, such as 2.0e11")
    return float(text)


def _share(text: str) -> float:
    if not re.fullmatch(r"0?\.\d+", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no share between 0 and 1, such as 0.8")
    return float(text)


def _adapter(text: str) -> str:
    name, _, source = text.partition("=")
    if not ADAPTER_NAME.fullmatch(name) or not source:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no NAME=SOURCE, where a name is of letters, digits, '.', '_', '-'"
        )
    return text


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"'{text}' is no port (0 to 65535)")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds")
    return float(text)


def parser() -> argparse.ArgumentParser:
    p = Parser("python -m serving", description="Serves a model package over OpenAI's HTTP API.", allow_abbrev=False)
    p.add_argument("model", metavar="MODEL", help="package, Hugging Face directory, or …/channels/<channel>.json")
    p.add_argument("--host", default=Settings.host)
    # A container's port is told by the environment, so that one manifest runs where the number is taken (contracts).
    p.add_argument("--port", type=_port, default=os.environ.get("HTTP_PORT", str(Settings.port)))
    p.add_argument("--served-name", help="what requests call the model; its registry or directory name by default")
    p.add_argument("--max-model-len", type=_count, metavar="TOKENS", help="prompt and answer together")
    p.add_argument("--max-num-seqs", type=_count, metavar="N", default=Settings.max_num_seqs, help="run together")
    p.add_argument("--max-queued-tokens", type=_count, metavar="TOKENS", default=Settings.max_queued_tokens)
    kv = p.add_mutually_exclusive_group()
    kv.add_argument(
        "--kv-bytes", type=parse_bytes, metavar="BYTES", help="memory for keys and values: 2GiB, 1073741824"
    )
    kv.add_argument(
        "--kv-share", type=_share, metavar="SHARE",
        help="the same as a share of what is free beside the weights: 0.8. By default what --max-num-seqs need, 0.5 at most",
    )  # fmt: skip
    # A URL may hold a password, which a command line would show to every process of the machine.
    p.add_argument(
        "--kv-spill", type=_spill, metavar="BYTES|URL", default=os.environ.get("KV_SPILL_URL"),
        help="keep prefixes that leave that memory: 4GiB, redis://host",
    )  # fmt: skip
    p.add_argument(
        "--engine", choices=("torch", "onnx"), default=Settings.engine, help="onnx: the package's model.onnx"
    )
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default=Settings.dtype)
    p.add_argument("--quantize", choices=("none", "int8", "int4"), default=Settings.quantize, help="weights, at load")
    p.add_argument(
        "--speculate-tokens", type=int, choices=range(17), metavar="N", default=Settings.speculate_tokens,
        help="guess up to N tokens ahead where the text repeats itself (0 to 16)",
    )  # fmt: skip
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default=Settings.device)
    p.add_argument(
        "--attention", choices=("sdpa", "flash"), default=Settings.attention,
        help="flash: FlashAttention where keys and values lie, and CUDA graphs; on a GPU, in bfloat16",
    )  # fmt: skip
    p.add_argument(
        "--linger-s", type=_seconds, metavar="S", default=Settings.linger_s,
        help="answer so long after SIGTERM, unready: routers hear of that late",
    )  # fmt: skip
    p.add_argument("--drain-s", type=_seconds, metavar="S", default=Settings.drain_s, help="longest wait for streams")
    p.add_argument("--poll-s", type=_seconds, metavar="S", default=Settings.poll_s, help="how often to read a channel")
    _add_engine_flags(p)
    _add_service_flags(p)
    return p


def _add_engine_flags(p: argparse.ArgumentParser) -> None:
    """Adapters, and what the hardware's use is measured against."""
    p.add_argument(
        "--adapter", dest="adapters", type=_adapter, action="append", metavar="NAME=SOURCE", default=[],
        help="a LoRA adapter that requests may name as their model: a directory, a registry entry or a channel",
    )  # fmt: skip
    p.add_argument(
        "--tensor-parallel-size", type=_count, metavar="N", default=Settings.tensor_parallel_size,
        help="processes that share one model: a GPU each, or a machine's processors",
    )  # fmt: skip
    p.add_argument("--adapters-dir", metavar="DIR", help="each directory in it that holds an adapter, by its name")
    p.add_argument("--max-adapters", type=_count, metavar="N", default=Settings.max_adapters, help="in memory at once")
    p.add_argument("--adapter-bytes", type=parse_bytes, metavar="BYTES", default=Settings.adapter_bytes)
    p.add_argument("--peak-bytes-per-s", type=_rate, metavar="RATE", help="the memory's bandwidth, for the metrics")
    p.add_argument("--peak-flops-per-s", type=_rate, metavar="RATE", help="the processor's peak, for the metrics")


def _add_service_flags(p: argparse.ArgumentParser) -> None:
    """Who may ask, for how long, and what is kept."""
    p.add_argument("--max-request-s", type=_seconds, metavar="S", default=Settings.max_request_s, help="then 504")
    p.add_argument("--min-free-bytes", type=parse_bytes, metavar="BYTES", default=Settings.min_free_bytes)
    p.add_argument("--api-keys", metavar="FILE", help="hashed API keys, made by `python -m serving.auth NAME`")
    store = os.environ.get("SESSION_STORE_URL")
    p.add_argument("--session-store", metavar="URL", default=store, help="redis://…, for the chat page's sessions")
    p.add_argument("--files-dir", metavar="DIR", help="keeps files and batches there, and answers their routes")
    p.add_argument("--admin-host", default=Settings.admin_host)
    p.add_argument("--admin-port", type=_port, default=os.environ.get("ADMIN_PORT"), help="status, reload, drain")


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line. Raises `Refused` for anything wrong, with the nearest flag for an unknown one."""
    p = parser()
    known, unknown = p.parse_known_args(argv)
    if unknown:
        flags = [flag for action in p._actions for flag in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        fix = f"Did you mean {nearest[0]}?" if nearest else f"See `{p.prog} --help`"
        raise Refused(f"unknown argument '{unknown[0]}'", where="command line", fix=fix)
    if known.poll_s < 0.05:
        raise Refused(f"--poll-s {known.poll_s} is too short", where="command line", fix="Give at least 0.05")
    if known.engine == "onnx":
        _refuse(p, known, NOT_ONNX, beside="--engine onnx")
    if known.tensor_parallel_size > 1:
        _refuse(p, known, NOT_SPLIT, beside="--tensor-parallel-size")
    return Settings(**{**vars(known), "adapters": tuple(known.adapters)})


def _refuse(p: argparse.ArgumentParser, known: argparse.Namespace, names: Sequence[str], *, beside: str) -> None:
    """Raises `Refused` for flags that were given and cannot be `beside` another."""
    for action in p._actions:
        if action.dest in names and getattr(known, action.dest) not in (getattr(Settings, action.dest), []):
            flag = action.option_strings[0]
            raise Refused(f"{flag} cannot be used with {beside}", where="command line", fix="Leave one of them out")
