"""Packages of Transformers load, tune and go back with the same numbers; adapters and classifiers open in its libraries."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from programs_of_trainer import TRAIN, run_program
from replicas_of_trainer import two_ranks
from safetensors import safe_open
from test_train_sources import CHATS, QUIET, config_of, write_rows

from trainer.command import read_train_command
from trainer.config import EvaluateConfig, PublishConfig, TrainConfig
from trainer.data import DataConfig, Dataset, make_dataset
from trainer.errors import Refused, StopSignal
from trainer.evaluate import evaluate
from trainer.export import export_package
from trainer.package import load_package, package_digest
from trainer.publish import publish
from trainer.shapes import read_settings, shape_of
from trainer.train import train

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "Llama": {"rope_parameters": STRETCHED},
    "Llama tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": None, "head_dim": 8},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 12, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Dataset:
    directory = tmp_path_factory.mktemp("chats")
    source = write_rows(directory / "rows", "jsonl", [{"messages": chat} for chat in CHATS])
    make_dataset(config_of(source, task={"kind": "chat"}), directory / "out", log=QUIET)
    return Dataset.open(directory / "out")


def their_package(name: str, directory: Path, dataset: Dataset, **more) -> Path:
    """A package that Transformers wrote, with random weights of a size that shows."""
    import transformers

    family = name.split()[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | {"vocab_size": dataset.vocab_size}, **FAMILIES[name])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():  # norms and biases begin as 1 and 0, and would hide
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    model.save_pretrained(directory, **more)
    for file in ("tokenizer.json", "chat_template.jinja"):
        (directory / file).write_bytes((dataset.directory / file).read_bytes())
    return directory


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_every_family_goes_there_and_back_with_the_same_logits(name, chats, tmp_path):
    from transformers import AutoModelForCausalLM

    package = their_package(name, tmp_path / "theirs", chats, max_shard_size="40KB")
    assert (package / "model.safetensors.index.json").exists()
    theirs, ours = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32).eval(), load_package(package)
    tokens = torch.randint(0, chats.vocab_size, (2, 200))
    want = theirs(tokens).logits
    assert want.std() > 0.1
    assert (ours(tokens) - want).abs().max() <= 1e-4
    export_package(ours, chats, tmp_path / "ours", provenance={}, shard_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    back, told = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(theirs)
    assert (back.eval()(tokens).logits - want).abs().max() <= 1e-4


def test_a_shard_is_read_written_and_let_go_before_the_next(chats, tmp_path):
    package = their_package("Llama", tmp_path / "theirs", chats)
    model, held = load_package(package), []
    parameters = dict(model.named_parameters())

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        held.append(sum(parameters[name].numel() * 4 for name in names))
        return {name: parameters[name].detach() for name in names}

    export_package(model, chats, tmp_path / "ours", provenance={}, read=read, shard_bytes=30_000)
    largest = max(parameter.numel() * 4 for parameter in parameters.values())
    assert len(held) > 2
    assert max(held) <= max(30_000, largest)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "positions of kind 'yarn'"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"attention_bias": True}, "attention biases"),
        ({"model_type": "gpt2"}, "type 'gpt2', not llama, mistral, qwen2, qwen3"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "config.json has no factor"),
        ({"rope_parameters": "x"}, "config.json cannot be read"),
    ],
)
def test_what_the_trainer_would_compute_otherwise_is_refused(chats, tmp_path, change, said):
    package = their_package("Llama tied", tmp_path / "theirs", chats)
    settings = json.loads((package / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(Refused, match=said):
        load_package(package)


def test_a_sliding_window_bounds_the_context():
    settings = {**SHAPE, "model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": 128, "rope_theta": 1e4}
    assert shape_of(settings, where="x")["max_context"] == 128


# Tuning


def tune(dataset: Dataset, package: Path, run: Path, **more) -> TrainConfig:
    shape = shape_of(read_settings(package), where=str(package))
    values = {**TRAIN, "seq": 160, "steps": 40, "optim": {"lr": 1e-2}, "model": shape, **more}
    config = TrainConfig.model_validate(values)
    train(config, data=dataset.directory, run=run, base=package, stop=StopSignal())
    return config


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_full_tuning_learns_answers_and_begins_from_the_package(chats, tmp_path):
    package = their_package("Qwen2", tmp_path / "theirs", chats)
    tune(chats, package, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.5 * curve[0]
    provenance = json.loads((tmp_path / "run" / "model" / "slipway.json").read_text())
    assert len(provenance["base_digest"]) == 64


def test_the_first_loss_is_of_the_answers_alone_as_transformers_computes_it(chats, tmp_path):
    from transformers import AutoModelForCausalLM

    from trainer.data import Cursor

    package = their_package("Qwen3", tmp_path / "theirs", chats)
    config = tune(chats, package, tmp_path / "run", steps=1)
    cursor = Cursor.of(chats, seq=160, global_batch=config.global_batch, seed=config.seed)
    batch = cursor.batch(0, micro=0, micro_batch=config.global_batch, rank=0, world=1)
    theirs = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32).eval()
    total, count = 0.0, 0
    assert batch.documents_BL is not None
    for tokens, targets, documents in zip(batch.tokens_BL, batch.targets_BL, batch.documents_BL, strict=True):
        for document in set(documents.tolist()) - {-1}:  # each example by itself, unpacked
            own, learnt = torch.from_numpy(tokens[documents == document]), targets[documents == document]
            with torch.inference_mode():
                logits = theirs(own[None]).logits[0].log_softmax(-1)
            at = (learnt >= 0).nonzero()[0]
            total -= float(logits[at, learnt[at]].sum())
            count += len(at)
    assert losses(tmp_path / "run")[0] == pytest.approx(total / count, rel=1e-4)


def test_adapters_learn_alone_and_open_in_peft_and_merged(chats, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    package = their_package("Llama", tmp_path / "theirs", chats)
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
    tune(chats, package, tmp_path / "merged", lora=lora)
    tune(chats, package, tmp_path / "apart", lora={**lora, "export": "adapters"})
    assert losses(tmp_path / "apart") == losses(tmp_path / "merged")
    assert losses(tmp_path / "apart")[-1] < losses(tmp_path / "apart")[0]
    tokens = torch.randint(0, chats.vocab_size, (2, 60))
    with torch.inference_mode():
        merged = load_package(tmp_path / "merged" / "model")(tokens)
        base = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "apart" / "model")).eval()(tokens).logits
    assert (merged - before).abs().max() > 0.01
    assert (merged - adapted).abs().max() <= 1e-4
    with safe_open(tmp_path / "apart" / "model" / "adapter_model.safetensors", framework="pt") as tensors:
        assert len(tensors.keys()) == 2 * 2 * 3


@pytest.fixture
def adapters(chats, tmp_path) -> tuple[Path, Path]:
    """A base and adapters of it that were trained a little."""
    base = their_package("Qwen2", tmp_path / "base", chats)
    tune(chats, base, tmp_path / "apart", steps=2, lora={"rank": 4, "export": "adapters"})
    return base, tmp_path / "apart" / "model"


def test_adapters_are_measured_judged_and_published_without_their_base(chats, adapters, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, package = adapters
    tune(chats, base, tmp_path / "merged", steps=2, lora={"rank": 4})
    config, reports = EvaluateConfig.model_validate({"sample": {"max_tokens": 2}}), []
    for model, more in ((tmp_path / "merged" / "model", {}), (package, {"base": base})):
        out = tmp_path / f"evaluation-of-{model.parent.name}"
        evaluate(config, model=model, data=chats.directory, out=out, log=QUIET, **more)
        reports.append(json.loads((out / "evaluation.json").read_text()))
    same = ("bits_per_byte", "loss", "intervals", "sample")
    assert [reports[0][name] for name in same] == [reports[1][name] for name in same]
    assert reports[0]["model_digest"] != reports[1]["model_digest"]

    registry, gate = tmp_path / "registry", PublishConfig.model_validate({"gate": {"must_beat": None}})
    words = {"registry": str(registry), "name": "support", "channel": "production", "log": QUIET}
    with pytest.raises(Refused, match="about another model"):
        publish(gate, model=package, report=tmp_path / "evaluation-of-merged" / "evaluation.json", **words)
    publish(gate, model=package, report=tmp_path / "evaluation-of-apart" / "evaluation.json", **words)
    channel = json.loads((registry / "models" / "support" / "channels" / "production.json").read_text())
    entry = registry / "models" / "support" / channel["digest"]
    assert json.loads((entry / "slipway.json").read_text())["base_digest"] == package_digest(base)
    assert not (entry / "model.safetensors").exists()
    tokens = torch.randint(0, chats.vocab_size, (2, 60))
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        opened = PeftModel.from_pretrained(theirs, str(entry)).eval()(tokens).logits
        assert (opened - load_package(entry, base=base)(tokens)).abs().max() <= 1e-4
        assert torch.equal(load_package(entry)(tokens), load_package(tmp_path / "merged" / "model")(tokens))


def test_adapters_without_their_own_base_are_refused(chats, adapters, tmp_path):
    base, package = adapters
    with pytest.raises(Refused, match=r"the base of the adapters is not there .*base=DIR"):
        load_package(package, base=tmp_path / "nowhere")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(Refused, match=r"was not trained on this base .*base=DIR"):
        load_package(package)


@pytest.mark.parametrize("cut", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapters_are_refused(adapters, cut):
    base, package = adapters
    (package / cut).write_bytes((package / cut).read_bytes()[:20])
    with pytest.raises(Refused, match="cannot be read"):
        load_package(package, base=base)


def test_a_misspelt_form_of_export_is_refused(train_yaml):
    train_yaml.write_text(yaml.safe_dump({**TRAIN, "lora": {"export": "adapter"}}))
    with pytest.raises(Refused, match=r"'lora.export': .*'merged' or 'adapters' .*train.yaml:"):
        read_train_command(["--config", str(train_yaml), "data=D", "run=R"])


def test_a_classifier_learns_and_opens_in_transformers(tmp_path):
    from transformers import AutoModelForSequenceClassification

    rows = [{"text": f"{'good' if n % 2 else 'bad'} thing {n // 2}", "label": n % 2} for n in range(80)]
    source = write_rows(tmp_path / "rows", "jsonl", rows)
    task = {"kind": "classify", "labels": ["no", "yes"]}
    make_dataset(config_of(source, task=task), tmp_path / "data", log=QUIET)
    dataset = Dataset.open(tmp_path / "data")
    config = TrainConfig.model_validate({**TRAIN, "steps": 60, "optim": {"lr": 1e-2}})
    train(config, data=tmp_path / "data", run=tmp_path / "run", stop=StopSignal())
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    ours = load_package(tmp_path / "run" / "model")
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    examples, right = dataset.examples("heldout"), 0
    for number in range(len(examples)):
        tokens, targets = examples.read(number, 0, int(examples.lengths()[number]))
        with torch.inference_mode():
            logits = theirs(torch.from_numpy(tokens)[None]).logits[0]
            assert (ours(torch.from_numpy(tokens)[None])[0, -1] - logits).abs().max() <= 1e-4
        right += int(logits.argmax()) == targets[-1]
    assert right == len(examples)


def test_the_shape_comes_with_the_package_and_another_is_refused(chats, tmp_path):
    package = their_package("Qwen3", tmp_path / "theirs", chats)
    path = tmp_path / "train.yaml"
    path.write_text("seq: 32\nglobal_batch: 4\nmicro_batch: 2\nsteps: 1\noptim: {lr: 1.0e-3}\n")
    words = ["--config", str(path), "data=D", "run=R", f"base={package}"]
    config, _ = read_train_command(words)
    assert (config.model.family, config.model.head_width) == ("qwen3", 12)
    path.write_text(path.read_text() + "model: {layers: 1}\n")
    with pytest.raises(Refused, match=r"'model' is not what base= says .*train.yaml:6"):
        read_train_command(words)


@pytest.mark.parametrize(
    ("settings", "files", "said"),
    [
        ({"vocab_size": 100}, {}, "vocab_size 100 has no room for token 299 of tokenizer.json"),
        ({"eos_token_id": []}, {}, "no end of text"),
        ({}, {"tokenizer.json": "{}"}, "cannot be read: .*tokenizer.json"),
        ({}, {"chat_template.jinja": b"\xff".decode("latin1")}, "not UTF-8"),
        ({}, {"chat_template.jinja": None}, "no chat template"),
    ],
)
def test_a_package_whose_words_cannot_be_used_makes_no_dataset(chats, tmp_path, settings, files, said):
    package = their_package("Llama", tmp_path / "theirs", chats)
    shutil.copyfile(chats.directory / "chat_template.jinja", package / "chat_template.jinja")
    said_before = json.loads((package / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(said_before | settings))
    for name, content in files.items():
        if content is None:
            (package / name).unlink()
        else:
            (package / name).write_bytes(content.encode("latin1"))
    source = write_rows(tmp_path / "rows", "jsonl", [{"messages": chat} for chat in CHATS])
    config = DataConfig.model_validate({"source": source, "held_out": 0.2, "task": {"kind": "chat"}})
    with pytest.raises(Refused, match=said):
        make_dataset(config, tmp_path / "out", log=QUIET, base=package)


def test_a_vocabulary_of_its_own_beside_a_package_is_refused(chats, tmp_path):
    package = their_package("Llama", tmp_path / "theirs", chats)
    source = write_rows(tmp_path / "rows", "jsonl", [{"text": "x" * 200}])
    config = DataConfig.model_validate({"source": source, "vocab_size": 400})
    with pytest.raises(Refused, match=r"vocab_size 400 is not the package's 300.*Leave vocab_size out"):
        make_dataset(config, tmp_path / "out", log=QUIET, base=package)


def test_a_damaged_index_is_refused(chats, tmp_path):
    package = their_package("Llama", tmp_path / "theirs", chats)
    (package / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(Refused, match=r"index\.json is damaged"):
        load_package(package)


def test_a_package_with_other_tokens_and_adapters_of_nothing_are_refused(chats, dataset, train_yaml, tmp_path):
    package = their_package("Llama", tmp_path / "theirs", chats)
    values = {key: value for key, value in TRAIN.items() if key != "model"}
    train_yaml.write_text(yaml.safe_dump(values))
    words = ["trainer", "--config", train_yaml, f"data={dataset}", f"run={tmp_path / 'run'}"]
    ended = run_program(*words, f"base={package}")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"different tokenizers ({package}). Make the dataset with its tokenizer" in ended.stderr
    assert not (tmp_path / "run").exists()
    with pytest.raises(Refused, match="random weights learn nothing"):
        train(TrainConfig.model_validate({**TRAIN, "lora": {}}), data=dataset, run=tmp_path / "run", stop=StopSignal())


def test_adapters_of_a_sharded_model_are_those_of_a_whole_one(chats, tmp_path):
    package = their_package("Qwen3", tmp_path / "theirs", chats)
    values = {key: value for key, value in TRAIN.items() if key != "model"}
    values |= {"seq": 160, "steps": 4, "lora": {"rank": 4}, "optim": {"lr": 1e-2}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    words = ["--config", str(tmp_path / "train.yaml"), f"data={chats.directory}", f"base={package}", "run=R"]
    config, _ = read_train_command(words)
    sharded, _ = read_train_command([*words, "parallelism.dp_shard=2"])
    where, said = {"data": chats.directory, "run": tmp_path / "two", "base": package}, tmp_path / "said"
    assert two_ranks(sharded, said=said, **where) == [0, 0], said.read_text()
    train(config, data=chats.directory, run=tmp_path / "one", base=package, stop=StopSignal())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_package(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)
