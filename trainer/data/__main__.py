"""`python -m trainer.data --config data.yaml out=DIR [base=DIR]`; `base` is a package whose tokenizer is used."""

from pathlib import Path

from trainer.command import read_command
from trainer.data.config import DataConfig
from trainer.data.make import make_dataset
from trainer.errors import run_program
from trainer.log import Log


def main(arguments: list[str]) -> None:
    config, places = read_command("trainer.data", DataConfig, places=("out",), optional=("base",), arguments=arguments)
    base = Path(places["base"]) if "base" in places else None
    make_dataset(config, Path(places["out"]), log=Log(), base=base)


if __name__ == "__main__":
    run_program(main)
