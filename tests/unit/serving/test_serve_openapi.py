"""The OpenAPI document is true: schemathesis makes requests from it, right ones and wrong ones, and finds nothing.

The server has API keys. What it checks: no 5xx, documented statuses, bodies and types that fit their schemas, wrong
bodies refused, no route open that the document calls closed, and answers to what the document calls right. A right
body may still ask for what this model does not have (a token outside its vocabulary, a longer context, a grammar that
no parser takes): those are the 400 and 404 that the checks allow for.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import hypothesis
import pytest
from conftest import Server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

KEY = "ada"
HEADERS = {"authorization": f"Bearer {KEY}"}
EXAMPLES = 8  # of each operation, right and wrong ones


class ApiKey:
    """How schemathesis comes by a key, so that it also tries without, and with a wrong one."""

    def get(self, *_: object) -> str:
        return HEADERS["authorization"]

    def set(self, case, data: str, *_: object) -> None:
        case.headers["Authorization"] = data


@pytest.fixture(scope="module")
def server(tiny: Path, start_server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    files = str(tmp_path_factory.mktemp("files"))
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "ada", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}))
    server = start_server(tiny, "--files-dir", files, "--max-request-s", "20", "--api-keys", str(keys)).wait_ready()
    server.http.headers.update(HEADERS)
    return server


MODES = ("positive", "negative")
# A route that takes nothing cannot be asked wrongly.
NO_WRONG_REQUEST = (hypothesis.errors.Unsatisfiable,)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_document_says_is_so(server: Server, mode: str) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json", headers=HEADERS)
    schema.auth()(ApiKey)
    schema.config.checks.positive_data_acceptance.expected_statuses = ["200", "204", "400", "401", "404", "409"]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 20
    for operation in operations:
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=strategy)
        def holds(case) -> None:
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):
                body["model"] = "tiny"  # else every request would end at the model's name
            case.call_and_validate(timeout=60)

        with contextlib.suppress(*(NO_WRONG_REQUEST if mode == "negative" else ())):
            holds()


def test_nothing_was_an_error_of_the_server(server: Server) -> None:
    """Last in the file."""
    assert server.events("error") == []
    assert server.metric('slipway_serve_requests_total{outcome="error"}') == 0
    assert server.process.poll() is None
