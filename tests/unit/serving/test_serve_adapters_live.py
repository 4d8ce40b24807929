"""Adapters over HTTP: named as models, loaded and taken off while the server runs, followed in their channels."""

import json
from pathlib import Path

import httpx
import pytest
from conftest import Server
from test_serve_lifecycle import refuse
from tiny_adapters import write_adapter
from tiny_packages import point, publish

from serving.adapters import AdapterShelf
from serving.errors import Refused
from serving.settings import Settings, parse

ASK = {"prompt": "def main", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        write_adapter(root / name, seed=seed)
    (root / "notes").mkdir()
    return root


@pytest.fixture(scope="module")
def server(tiny: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory, start_server) -> Server:
    later = tmp_path_factory.mktemp("registry") / "models" / "tiny" / "channels" / "production.json"
    flags = ["--adapters-dir", str(folder), "--adapter", f"later={later}", "--admin-port", "0", "--max-adapters", "1"]
    return start_server(tiny, *flags).wait_ready()


def admin(server: Server, method: str, path: str, body: dict | None = None) -> httpx.Response:
    return httpx.request(method, f"http://127.0.0.1:{server.wait_for('admin')['port']}{path}", json=body, timeout=60)


def ask(server: Server, model: str) -> str:
    answer = server.http.post(server.url + "/v1/completions", json={"model": model, **ASK})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


def test_requests_name_adapters_as_models(server: Server) -> None:
    models = {model["id"]: model for model in server.get("/v1/models").json()["data"]}
    assert {name: model["parent"] for name, model in models.items()} == {"tiny": None, "one": "tiny", "two": "tiny"}
    assert server.get("/v1/models/two").json() == models["two"]
    answers = {name: ask(server, name) for name in models}
    assert len(set(answers.values())) == 3
    assert {name: ask(server, name) for name in models} == answers
    assert server.metric("slipway_serve_adapter_evictions_total") >= 1  # there is room for one at a time
    missing = server.http.post(server.url + "/v1/completions", json={"model": "later", **ASK})
    assert missing.status_code == 404
    assert "there is no adapter yet" in missing.text


def test_adapters_come_and_go_while_the_server_runs(server: Server, folder: Path, tmp_path: Path) -> None:
    before = ask(server, "one")
    assert admin(server, "PUT", "/adapters/new", {"source": str(folder / "one")}).status_code == 200
    assert ask(server, "new") == before
    other = write_adapter(tmp_path / "misfit", seed=5, num_hidden_layers=3)
    refused = admin(server, "PUT", "/adapters/new", {"source": str(other)})
    assert (refused.status_code, "the model has 2 layers" in refused.text) == (400, True)
    assert ask(server, "new") == before  # what is served outlives what is refused
    for name, source in (("tiny", folder / "one"), ("a%20b", folder / "one"), ("x", tmp_path / "nowhere")):
        assert admin(server, "PUT", f"/adapters/{name}", {"source": str(source)}).status_code == 400
    assert admin(server, "DELETE", "/adapters/new").status_code == 200
    assert admin(server, "DELETE", "/adapters/new").status_code == 404
    assert server.http.post(server.url + "/v1/completions", json={"model": "new", **ASK}).status_code == 404
    assert set(admin(server, "GET", "/adapters").json()["ready"]) == {"one", "two"}


def test_an_adapter_follows_its_channel(server: Server, folder: Path) -> None:
    (flag,) = [text for text in server.process.args if text.startswith("later=")]
    registry = Path(flag.removeprefix("later=")).parents[3]
    for name in ("one", "two"):
        point(registry, publish(folder / name, registry))
        digest = json.loads(Path(flag.removeprefix("later=")).read_text())["digest"]
        server.wait_until(lambda digest=digest: server.get("/v1/models/later").json().get("digest") == digest, name)
        assert ask(server, "later") == ask(server, name)


def test_adapters_that_cannot_be_are_refused_at_once(tiny: Path, folder: Path, tmp_path: Path) -> None:
    assert "adapter_config.json is missing" in refuse(tiny, "--port", "0", "--adapter", f"a={tmp_path}")
    with pytest.raises(Refused, match="NAME=SOURCE"):
        parse([str(tiny), "--adapter", "a b=/x"])
    for settings, says in (
        ({"adapters_dir": str(folder), "adapters": (f"one={folder / 'two'}",)}, "two adapters are named 'one'"),
        ({"adapters_dir": str(tmp_path / "nowhere")}, "--adapters-dir"),
        ({"adapters": (f"tiny={folder / 'two'}",)}, "cannot be named 'tiny'"),
    ):
        with pytest.raises(Refused, match=says):
            AdapterShelf(Settings(model=str(tiny), **settings), model="tiny", on_gone=lambda _: None)
