"""What images install is decided by lists, so that layers depend on packages and not on the files that say them."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from infra.images.inside.lists import PACKAGES, wanted

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMPILE = """
import sys; from pathlib import Path; from infra.images.inside.install import compile_all
compile_all(Path(sys.argv[1]), out=Path(sys.argv[1]).parent)
"""
NAMES = st.lists(st.sampled_from("abcdef"), unique=True)


def test_both_images_ask_for_the_same_shared_packages() -> None:
    (trainer, besides_trainer), (serving, besides_serving) = (wanted(EXTRAS, package, []) for package in PACKAGES)
    assert trainer == serving
    assert "torch" in trainer
    assert "matplotlib" in besides_trainer
    assert "uvicorn" in besides_serving


@given(trainer=NAMES, serving=NAMES, others=NAMES, drivers=NAMES)
def test_the_lists_hold_what_the_extra_asks_once_and_no_order_of_the_file(
    trainer: list[str], serving: list[str], others: list[str], drivers: list[str]
) -> None:
    both, besides = wanted({"trainer": trainer, "serving": serving, "dev": others}, "trainer", drivers)
    assert sorted([*both, *besides]) == sorted({*trainer, *drivers})
    assert set(both) == set(trainer) & set(serving)
    turned = {"dev": [], "serving": serving[::-1], "trainer": trainer[::-1]}
    assert wanted(turned, "trainer", drivers[::-1]) == (both, besides)


def test_the_heavy_layers_depend_on_no_file_that_changes_for_other_reasons() -> None:
    """Of the stages that install and compile, each is made from its list, and from what runs in the build."""
    for package in PACKAGES:
        stages = (ROOT / package / "Dockerfile").read_text().split("\nFROM ")
        shared = next(stage for stage in stages if "AS shared" in stage.splitlines()[0])
        copied = [word for line in shared.splitlines() if line.startswith("COPY") for word in line.split()[1:]]
        assert not {"pyproject.toml", "constraints.txt", package} & set(copied)
        assert "/build/shared.txt" in copied


def test_the_dockerfiles_are_the_same_as_far_as_the_shared_layers_go() -> None:
    heads = []
    for package in PACKAGES:
        text = (ROOT / package / "Dockerfile").read_text().split("\nFROM shared AS own")[0]
        heads.append(text[text.index("ARG BASE") :].replace(f"inside.lists {package}", "inside.lists PACKAGE"))
    assert heads[0] == heads[1]


def test_bytecode_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Whenever the sources were written, wherever they lie in the build, and however the compiler's sets are ordered."""
    found: list[dict[str, bytes]] = []
    for seed in ("1", "2"):
        app = tmp_path / seed / "app"
        app.mkdir(parents=True)
        (app / "one.py").write_text("def f(x):\n    return x in {'a', 'b', 'c', 'd', 'e', 'f', 'g'}\n")
        (app / "template.py").write_text("{{ no Python }}")
        os.utime(app / "one.py", (int(seed) * 1e6, int(seed) * 1e6))
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", COMPILE, app], check=True, cwd=ROOT, env=environment, capture_output=True)
        found.append({path.name: path.read_bytes() for path in app.rglob("*.pyc")})
    assert found[0] == found[1]
    (bytecode,) = found[0].values()
    assert b"/app/one.py" in bytecode
    assert str(tmp_path).encode() not in bytecode
