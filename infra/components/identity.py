"""Which pods reach an object store, and as whom: pure functions of the spec."""

from infra.components.model_registry import is_remote
from infra.spec import Located, Stack


def opened_urls(stack: Stack) -> dict[str, tuple[str, ...]]:
    """Component → URLs that its pods open; volumes and directories are not among them."""
    training = stack.training
    corpora = [source for _, source in training.data.sources if isinstance(source, Located)] if training else []
    urls = {
        "data": tuple(corpus.path for corpus in corpora),
        "train": (training.checkpoint.url,) if training else (),
        "promote": (stack.registry.url, *training.evaluate.urls) if training else (),
        "serve": (stack.registry.url,) if stack.services else (),
        "router": (),
        "keep": (),
    }
    if training and training.meets:
        urls["meet"] = ()
    if stack.batches:
        urls["batch"] = (stack.registry.url, *(url for batch in stack.batches for url in (batch.input, batch.output)))
    return {component: tuple(url for url in opened if url and is_remote(url)) for component, opened in urls.items()}


def object_store_users(stack: Stack) -> tuple[str, ...]:
    """Components whose pods talk to an object store."""
    return tuple(component for component, urls in opened_urls(stack).items() if urls)


def accounts(stack: Stack) -> dict[str, dict[str, str]]:
    """ServiceAccount of each component → annotations: an identity at the cloud only where an object store is opened."""
    return {component: dict(stack.registry.identity) if urls else {} for component, urls in opened_urls(stack).items()}
