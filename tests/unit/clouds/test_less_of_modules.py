"""Modules that are built without some of their parts: what stays, what stands in, and that nothing names what is gone."""

from pathlib import Path

import pytest

from infra.clouds.local import less
from infra.clouds.local.golang import TOOLS
from infra.clouds.local.less import LESS, Less

CHOICE = """package build

func build(kind string) (Scaler, error) {
	switch kind {
	case "cron":
		return scalers.NewCronScaler(config)
	case "kafka":
		return scalers.NewKafkaScaler(ctx, config)
	default:
		return nil, fmt.Errorf("no scaler for %s", kind)
	}
}
"""
WHOLE = {
    "go.mod": "module example.org/scaling\n",
    "build/choice.go": CHOICE,
    "scalers/cron_scaler.go": "package scalers\n\nfunc NewCronScaler(c *Config) (Scaler, error) {}\n",
    "scalers/kafka_scaler.go": "package scalers\n\nfunc NewKafkaScaler(x Context, c *Config) (Scaler, error) {}\n",
    "scalers/scaler.go": "package scalers\n",
    "scalers/aws/client.go": "package aws\n",
}
CUT = Less(
    module="example.org/scaling",
    without=("scalers/*_scaler.go", "scalers/aws/*"),
    but=("scalers/cron_scaler.go",),
    choice="build/choice.go",
)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    instead = {"instead/scalers/aws/absent.go": "package aws // none\n"}
    tool = write(tmp_path / "tool", {"go.mod": "module tool\n", "go.sum": "sums\n"} | instead)
    whole = write(tmp_path / "whole", WHOLE)
    for path in whole.rglob("*.go"):
        path.chmod(0o444)  # as in Go's module cache
    less.make(CUT, whole, tool=tool, folder=tmp_path / "made")
    return tmp_path / "made"


def test_what_is_left_out_is_gone_and_what_stands_in_is_there(made: Path) -> None:
    inside = made / "less"
    files = {str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_file()}
    gone = {"scalers/kafka_scaler.go", "scalers/aws/client.go"}
    assert files == (set(WHOLE) - gone) | {"scalers/aws/absent.go"}


def test_only_what_stays_can_be_chosen(made: Path) -> None:
    text = (made / "less" / CUT.choice).read_text()
    assert text == CHOICE.replace('\tcase "kafka":\n\t\treturn scalers.NewKafkaScaler(ctx, config)\n', "")


def test_it_takes_the_modules_place_by_a_path_that_is_the_same_everywhere(made: Path) -> None:
    assert (made / "go.mod").read_text().endswith("\nreplace example.org/scaling => ./less\n")
    assert (made / "go.sum").read_text() == "sums\n"


@pytest.mark.parametrize("name", LESS)
def test_what_stands_in_is_in_packages_that_lose_files(name: str) -> None:
    """Else it would be a file of the module's own that is replaced."""
    instead = TOOLS / name / "instead"
    stand_ins = [path.relative_to(instead) for path in instead.rglob("*.go")]
    assert stand_ins
    folders = {str(Path(pattern).parent) for pattern in LESS[name].without}
    assert {str(path.parent) for path in stand_ins} <= folders
