"""The gate between training and traffic: a model that is good enough goes into the registry, and its channel follows.

`python -m trainer.publish --config publish.yaml model=DIR report=FILE registry=URL name=NAME channel=CHANNEL`
"""

import time
from pathlib import Path
from typing import Any

from trainer.command import read_command
from trainer.config import GateConfig, PublishConfig
from trainer.errors import Refused, run_program
from trainer.files import read_json
from trainer.log import Log
from trainer.registry import Registry, check_name
from trainer.shapes import ADAPTERS_CONFIG, holds_adapters, weights_digest
from trainer.stores import answering

_PLACES = ("model", "report", "registry", "name", "channel")


def judge(gate: GateConfig, report: dict[str, Any]) -> tuple[bool, str]:
    """Whether the measured model may pass, and why, in one sentence. NaN passes nothing."""
    measured, passed = report["bits_per_byte"], []
    if measured is None and (gate.must_beat or gate.max_bits_per_byte):
        return False, "a classifier has no bits per byte: set must_beat to null and give min_accuracy"
    if measured is not None:
        opens, why = _judge_bits(gate, measured, report["baselines"])
        if not opens:
            return False, why
        passed.append(why)
    for name, least in gate.min_accuracy.items():
        found = report.get("accuracy", {}).get(name)
        if found is None:
            return False, f"the report has no accuracy of {name}: add it to tasks in evaluate.yaml"
        if not found["value"] >= least:
            return False, f"{found['value']:.1%} of {name} right is below the {least:.1%} wanted"
        passed.append(f"{found['value']:.1%} of {name} right ({found['low']:.1%} to {found['high']:.1%})")
    return True, "; ".join(passed) or "nothing is asked of it"


def _judge_bits(gate: GateConfig, measured: float, baselines: dict[str, float]) -> tuple[bool, str]:
    if gate.must_beat is not None:
        baseline = baselines.get(gate.must_beat)
        if baseline is None:
            return False, f"the report has no {gate.must_beat} to beat: add it to baselines in evaluate.yaml"
        if not measured < baseline:
            return False, f"{measured:.3f} bits per byte is not below the {gate.must_beat}'s {baseline:.3f}"
    if gate.max_bits_per_byte is not None and not measured <= gate.max_bits_per_byte:
        return False, f"{measured:.3f} bits per byte is above the {gate.max_bits_per_byte:.3f} allowed"
    beaten = f", below the {gate.must_beat}'s {baselines[gate.must_beat]:.3f}" if gate.must_beat else ""
    return True, f"{measured:.3f} bits per byte{beaten}"


def publish(
    config: PublishConfig, *, model: Path, report: Path, registry: str, name: str, channel: str, log: Log
) -> None:
    """Raises Refused when the gate does not open, or for a report, package or registry that cannot be used."""
    begun_s = time.monotonic()
    check_name(name)
    check_name(channel)
    measured = _read_report(report)
    _check_package(model, measured, report)
    passed, why = judge(config.gate, measured)
    log.emit("gate", passed=passed, why=why)
    if not passed:
        fix = "Train longer or on more data, or change gate in publish.yaml."
        raise Refused(f"the gate stays shut: {why}", where=str(report), fix=fix)
    store = Registry.open(registry)
    try:
        with answering(registry, what="registry"):
            digest = store.publish(model, name=name, log=log)
            current = store.channel(name, channel)
            skipped = current is not None and current["digest"] == digest
            if not skipped:
                store.move_channel(name, channel, digest=digest, report=measured)
    except (PermissionError, NotADirectoryError) as error:
        fix = "Make it writable for this user, or give registry= another place."
        raise Refused(f"the registry cannot be written: {error.strerror}", where=registry, fix=fix) from None
    log.emit("published", name=name, digest=digest, channel=channel)
    log.emit("done", stage="publish", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _read_report(path: Path) -> dict[str, Any]:
    report = read_json(path)
    if report is None or "bits_per_byte" not in report or "baselines" not in report:
        fix = "Name the evaluation.json of python -m trainer.evaluate."
        raise Refused("there is no evaluation report", where=str(path), fix=fix)
    return report


def _check_package(model: Path, report: dict[str, Any], report_path: Path) -> None:
    adapters, fix = holds_adapters(model), "Name the model/ of a finished run."
    for file in (ADAPTERS_CONFIG if adapters else "config.json", "tokenizer.json", "slipway.json"):
        if not (model / file).is_file():
            raise Refused(f"the model package is not whole: {file} is absent", where=str(model), fix=fix)
    if adapters and "base_digest" not in (read_json(model / "slipway.json") or {}):
        raise Refused("the adapters do not say what base they are for", where=str(model / "slipway.json"), fix=fix)
    if report.get("model_digest") != weights_digest(model):
        fix = "Evaluate this model first."
        raise Refused("the report is about another model", where=str(report_path), fix=fix)


def main(arguments: list[str]) -> None:
    config, given = read_command("trainer.publish", PublishConfig, places=_PLACES, arguments=arguments)
    model, report = Path(given["model"]), Path(given["report"])
    publish(
        config,
        model=model,
        report=report,
        registry=given["registry"],
        name=given["name"],
        channel=given["channel"],
        log=Log(),
    )


if __name__ == "__main__":
    run_program(main)
