"""Where models come from: what is named is found, what was changed is refused with the file's name."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_packages import make_package, point, publish

from serving import settings
from serving.chat_template import ChatTemplate
from serving.errors import Refused
from serving.package import Channel, Package, fetch, resolve
from serving.tokenizer import Tokenizer


def ignore(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def registry(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("registry")
    return root, publish(tiny, root)


def test_a_directory_a_digest_and_a_channel_are_told_apart(registry: tuple[Path, str], tiny: Path) -> None:
    root, digest = registry
    entry = f"{root}/models/tiny/{digest}"
    assert resolve(str(tiny)) == Package(url=str(tiny), name="tiny", digest=None)
    assert resolve(entry + "/") == Package(url=entry, name="tiny", digest=digest)
    channel = resolve(f"{root}/models/tiny/channels/production.json")
    assert isinstance(channel, Channel)
    assert channel.name == "tiny"
    assert resolve("s3://bucket/models/tiny/channels/staging.json") == Channel(
        url="s3://bucket/models/tiny/channels/staging.json", model_url="s3://bucket/models/tiny", name="tiny"
    )


def test_a_channel_is_nothing_until_it_points(registry: tuple[Path, str]) -> None:
    root, digest = registry
    channel = resolve(f"{root}/models/tiny/channels/later.json")
    assert isinstance(channel, Channel)
    assert channel.read() is None
    path = point(root, digest, channel="later")
    assert channel.read() == Package(url=f"{root}/models/tiny/{digest}", name="tiny", digest=digest)
    for broken in ("", "[]", "{}", '{"digest": 1}', '{"digest": "../../etc"}', "[" * 100_000):
        path.write_text(broken)
        with pytest.raises(Refused, match=r"later\.json"):
            channel.read()


def test_a_whole_package_is_verified(registry: tuple[Path, str]) -> None:
    root, digest = registry
    package = Package(url=f"{root}/models/tiny/{digest}", name="tiny", digest=digest)
    assert fetch(package, on_bytes=ignore) == Path(package.url)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "missing", "truncated"])
def test_a_tampered_package_is_refused_by_the_files_name(name: str, how: str, tiny: Path, tmp_path: Path) -> None:
    digest = publish(tiny, tmp_path)
    path = tmp_path / "models" / "tiny" / digest / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data if how == "changed" else data[: len(data) // 2])
    with pytest.raises(Refused, match=name):
        fetch(Package(url=str(path.parent), name="tiny", digest=digest), on_bytes=ignore)


def test_a_manifest_that_matches_its_own_files_but_not_the_digest_is_refused(tiny: Path, tmp_path: Path) -> None:
    digest = publish(tiny, tmp_path)
    other = publish(make_package(tmp_path / "other", seed=1), tmp_path)
    entry = tmp_path / "models" / "tiny" / digest
    for path in (tmp_path / "models" / "tiny" / other).iterdir():
        (entry / path.name).write_bytes(path.read_bytes())
    with pytest.raises(Refused, match="digest"):
        fetch(Package(url=str(entry), name="tiny", digest=digest), on_bytes=ignore)


def test_a_remote_package_is_cached_whole_or_not_at_all(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = publish(tiny, tmp_path)
    remote = fsspec.filesystem("memory")
    url = f"memory://registry/models/tiny/{digest}"
    remote.put(f"{tmp_path}/models/tiny/{digest}/", f"/registry/models/tiny/{digest}/", recursive=True)
    package = resolve(url)
    assert isinstance(package, Package)
    remote.pipe(f"/registry/models/tiny/{digest}/tokenizer.json", b"{}")
    with pytest.raises(Refused, match=r"tokenizer\.json"):
        fetch(package, on_bytes=ignore)
    assert not list((tmp_path / "cache" / "slipway" / "models").iterdir())
    remote.pipe(f"/registry/models/tiny/{digest}/tokenizer.json", (tiny / "tokenizer.json").read_bytes())
    root = fetch(package, on_bytes=ignore)
    assert (root / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_broken_text_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    root = make_package(tmp_path / "p")
    (root / name).write_text("{% if %} {")
    read = ChatTemplate.read if name == "chat_template.jinja" else Tokenizer
    with pytest.raises(Refused, match=name):
        read(root)


def test_the_template_is_rendered_in_a_sandbox(tmp_path: Path) -> None:
    root = make_package(tmp_path / "p")
    template = ChatTemplate.read(root)
    assert template is not None
    assert template.render([{"role": "user", "content": "{{ 1 }}"}], tools=[]) == "<|user|>{{ 1 }}\n<|assistant|>"
    with pytest.raises(ValueError, match="unknown role"):
        template.render([{"role": "pirate", "content": ""}], tools=[])
    (root / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    hostile = ChatTemplate.read(root)
    assert hostile is not None
    with pytest.raises(ValueError, match="unsafe"):
        hostile.render([], tools=[])


@given(text=st.text(max_size=40))
def test_token_bytes_join_to_the_text(tiny: Path, text: str) -> None:
    tokenizer = Tokenizer(tiny)
    ids = tokenizer.encode(text, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["m", "--prot", "80"], "--port"),
        (["m", "--port", "70000"], "70000"),
        (["m", "--max-num-seqs", "0"], "'0' must be above 0"),
        (["m", "--kv-bytes", "lots"], "no size in bytes"),
        (["m", "--kv-share", "1.5"], "between 0 and 1"),
        (["m", "--kv-share", "0.5", "--kv-bytes", "1GiB"], "not allowed with"),
        (["m", "--drain-s", "nan"], "number of seconds"),
        (["m", "--dtype", "int3"], "invalid choice"),
        ([], "model|MODEL"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv: list[str], says: str) -> None:
    with pytest.raises(Refused, match=says) as refusal:
        settings.parse(argv)
    assert "\n" not in str(refusal.value)


def test_flags_and_environment_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "8123")
    asked = settings.parse(["m", "--kv-bytes", "1.5GiB", "--served-name", "x"])
    assert (asked.port, asked.kv_bytes, asked.served_name) == (8123, 3 * 2**29, "x")
    assert settings.parse(["m", "--port", "1"]).port == 1
    monkeypatch.setenv("KV_SPILL_URL", "redis://:secret@store")
    assert settings.parse(["m"]).kv_spill == "redis://:secret@store"
    with pytest.raises(Refused, match="--kv-spill cannot be used with"):
        settings.parse(["m", "--tensor-parallel-size", "2"])
    json.dumps(vars(asked))
