"""Whether a runtime can do what a service asks: everything that it would silently leave undone is refused, with the way out."""

from infra.spec.base import Misplaced
from infra.spec.runtimes import PLACEHOLDERS, Runtime
from infra.spec.serving import Service

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
    if runtime.is_own and service.adapters and service.gpus > 1:
        raise Misplaced(
            f"a replica that is split over {service.gpus} GPUs takes no adapters; gpus: 1, or a package with the adapter merged",
            *keys,
            "adapters",
        )
    if service.session_store and not runtime.is_own:
        raise Misplaced(
            f"runtime {runtime.name!r} has no chat page, and so no sessions; leave it out", *keys, "session_store"
        )
    said = {"kv_gib" if key == "kv_share" else key for key in service.model_fields_set}
    for key in sorted({key for key in PLACEHOLDERS.values() if key} & said - runtime.told - {"gpus", "drain_s"}):
        raise Misplaced(
            f"runtime {runtime.name!r} has no such setting, and the value would be lost; leave it out", *keys, key
        )
