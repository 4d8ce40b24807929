"""A kubeconfig that names no cluster is refused at once, and leaves nothing."""

from pathlib import Path

import pytest

from infra.clouds import local as clusters


@pytest.mark.parametrize(
    "text", [b"", b"no: cluster\n", b"{", b"\xff\x00", b"kind: Config\ncurrent-context: nowhere\n"]
)
def test_what_is_no_kubeconfig_is_refused(tmp_path: Path, text: bytes) -> None:
    places = clusters.Places(state=tmp_path / "state", cache=tmp_path / "cache")
    (tmp_path / "config").write_bytes(text)
    with pytest.raises(clusters.Unable, match=r"no cluster in .*config .*\. Fix: "):
        clusters.up(places, kubeconfig=tmp_path / "config", gpus=0, say=print)
    assert not places.state.exists()
    assert clusters.status(places, tmp_path / "config").up is False
