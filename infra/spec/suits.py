"""Whether a runtime can do what a service asks: everything that it would silently leave undone is refused, with the way out."""

from infra.spec.base import Misplaced
from infra.spec.runtimes import PLACEHOLDERS, Runtime
from infra.spec.serving import WIDENED, Service

ROUTES = {
    "openai": "OpenAI's routes (/v1/chat/completions, …)",
    "kserve": "KServe's (/v2/models/…/infer)",
    "tensorflow": "TensorFlow's (/v1/models/…:predict)",
}
FORMATS = {
    "huggingface": "a Hugging Face directory",
    "onnx": "an ONNX graph",
    "saved_model": "TensorFlow SavedModels",
    "triton": "a Triton model repository",
}


def refuse_unsuited(service: Service, runtime: Runtime, *, trained: bool, keys: tuple[str | int, ...]) -> None:
    """Raise `Misplaced` for what `runtime` cannot do. `trained`: the stack's training makes the model, in Hugging Face layout."""
    if service.api != runtime.api:
        raise Misplaced(
            f"runtime {runtime.name!r} speaks {ROUTES[runtime.api]}, and the service asks for {ROUTES[service.api]}; "
            f"api: {runtime.api}, or another runtime",
            *keys,
            "api" if "api" in service.model_fields_set else "runtime",
        )
    if trained and runtime.model_format != "huggingface":
        raise Misplaced(
            f"runtime {runtime.name!r} loads {FORMATS[runtime.model_format]}, and the training makes "
            f"{FORMATS['huggingface']}; another runtime, or a model that was published in that form",
            *keys,
            "runtime",
        )
    if runtime.needs_gpu and not service.gpus:
        raise Misplaced(f"runtime {runtime.name!r} computes on GPUs only; gpus: 1, or another runtime", *keys, "gpus")
    if runtime.is_own:
        _refuse_unsuited_to_gpus(service, keys=keys)
    elif service.stores:
        lacks = {"session": "has no chat page, and so no sessions", "prefix": "keeps its prefixes to itself"}
        what = next(iter(service.stores))
        raise Misplaced(f"runtime {runtime.name!r} {lacks[what]}; leave it out", *keys, f"{what}_store")
    said = {"kv_gib" if key == "kv_share" else key for key in service.model_fields_set}
    for key in sorted({key for key in PLACEHOLDERS.values() if key} & said - runtime.told - {"gpus", "drain_s"}):
        raise Misplaced(
            f"runtime {runtime.name!r} has no such setting, and the value would be lost; leave it out", *keys, key
        )


def _refuse_unsuited_to_gpus(service: Service, *, keys: tuple[str | int, ...]) -> None:
    """Raise `Misplaced` for what Slipway's own server does on one GPU only, on none, or not without."""
    split = f"a replica that is split over {service.gpus} GPUs"
    for key, lacks, way_out in (
        ("adapters", "takes no adapters", "gpus: 1, or a package with the adapter merged"),
        ("spill_gib", "keeps its prefixes on them", "gpus: 1, or leave it out"),
        ("prefix_store", "keeps its prefixes on them", "gpus: 1, or leave it out"),
        ("attention", "computes attention by sdpa", "gpus: 1, or leave it out"),
    ):
        if service.gpus > 1 and getattr(service, key) != Service.model_fields[key].default:
            raise Misplaced(f"{split} {lacks}; {way_out}", *keys, key)
    if service.quantize and service.gpus:
        raise Misplaced(f"{WIDENED}, or runtime: vllm with a package that was quantised for it", *keys, "quantize")
    if service.attention == "flash" and (not service.gpus or service.dtype == "float32"):
        raise Misplaced("FlashAttention computes on a GPU, in bfloat16; attention: sdpa", *keys, "attention")
