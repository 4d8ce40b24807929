"""The rewriting rules of docs/contracts.md, "One machine"."""

import shutil
import string
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.local import rewrite

NAMES = st.text(string.ascii_uppercase + "_", min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        # the table of kubernetes/third_party/forked/golang/expansion/expand_test.go, in small
        ("$(A)", "a"),
        ("x$(A)y$(B)", "xayb"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$a"),
        ("$(NONE)", "$(NONE)"),
        ("$(EMPTY)|", "|"),
        ("$(A", "$(A"),
        ("$A ${A}", "$A ${A}"),
        ("$", "$"),
        ("$()", "$()"),
        ("$$$$", "$$"),
        ("$($(A))", "$($(A))"),
    ],
)
def test_expansion_is_that_of_kubernetes(text: str, expanded: str):
    assert rewrite.expand(text, {"A": "a", "B": "b", "EMPTY": ""}) == expanded


@given(st.text(), st.dictionaries(NAMES, st.text()))
def test_an_escaped_text_is_never_expanded(text: str, variables: dict[str, str]):
    assert rewrite.expand(text.replace("$", "$$"), variables) == text


@given(NAMES, st.text(), st.text("abc/=: "))
def test_a_value_is_taken_as_it_is(name: str, value: str, around: str):
    assert rewrite.expand(f"{around}$({name}){around}", {name: value}) == around + value + around


MOUNTS = {"/data": Path("/s/v"), "/data/cache": Path("/s/cache"), "/etc/train.yaml": Path("/s/c/train.yaml")}


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("/data", "/s/v"),
        ("/data/", "/s/v/"),
        ("/data/cache/x", "/s/cache/x"),
        ("data=/data/tokens", "data=/s/v/tokens"),
        ("--out=/data", "--out=/s/v"),
        ("registry=file:///data/models", "registry=file:///s/v/models"),
        ("/data:/data/cache", "/s/v:/s/cache"),
        ("cat '/data/x' > /data/y", "cat '/s/v/x' > /s/v/y"),
        ("/etc/train.yaml", "/s/c/train.yaml"),
        # not the start of a path, or another path
        ("/database", "/database"),
        ("/data.bak", "/data.bak"),
        ("/data-2/x", "/data-2/x"),
        ("/mnt/data", "/mnt/data"),
        ("s3://data/x", "s3://data/x"),
        ("s3://bucket/data/x", "s3://bucket/data/x"),
        ("http://127.0.0.1:80/data", "http://127.0.0.1:80/data"),
        ("data", "data"),
    ],
)
def test_a_mount_path_is_replaced_at_the_start_of_a_path_only(text: str, rewritten: str):
    assert rewrite.paths(text, MOUNTS) == rewritten


@given(st.text("/data=:ce x"))
def test_a_directory_below_its_own_mount_path_is_replaced_once(text: str):
    """The state directory may itself lie under /data."""
    mounts = {"/data": Path("/data/state/volumes/data")}
    assert rewrite.paths(text, mounts).count("/state/") == rewrite.paths(text, {"/data": Path("/#")}).count("/#")


def _resolve(host: str, port: int) -> str | None:
    return {("serve.team.svc", 80): "127.0.0.1:21000", ("train-0.train", 29400): "127.0.0.1:22000"}.get((host, port))


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("train-0.train:29400", "127.0.0.1:22000"),
        ("--rdzv-endpoint=train-0.train:29400", "--rdzv-endpoint=127.0.0.1:22000"),
        ("http://serve.team.svc:80/v1", "http://127.0.0.1:21000/v1"),
        ("a=train-0.train:29400,serve.team.svc:80", "a=127.0.0.1:22000,127.0.0.1:21000"),
        ("train-0.train:294000", "train-0.train:294000"),
        ("my-train-0.train:29400", "my-train-0.train:29400"),
        ("example.com:80", "example.com:80"),
        ("--bind=0.0.0.0", "--bind=127.0.0.1"),
        ("0.0.0.0:8000", "127.0.0.1:8000"),
        ("10.0.0.0", "10.0.0.0"),
        ("0.0.0.0.1", "0.0.0.0.1"),
        ("v20.0.0.0", "v20.0.0.0"),
    ],
)
def test_known_hosts_and_the_wildcard_address_are_replaced(text: str, rewritten: str):
    assert rewrite.hosts(text, _resolve) == rewritten


@given(st.text())
def test_a_text_that_names_nothing_is_left_alone(text: str):
    assert rewrite.hosts(text.replace("0.0.0.0", ""), lambda *_: None) == text.replace("0.0.0.0", "")


def test_programs():
    assert rewrite.program("python") == sys.executable
    assert shutil.which(rewrite.program("envoy"))
    assert rewrite.program("sh") == "sh"


def test_port_variable():
    assert rewrite.port_variable("http-admin") == "HTTP_ADMIN_PORT"
