"""Checkpoints and adapters that fit in part, or another base, are refused; a head that nobody trained is for training alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import peft
import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from zotune.cli.app import run
from zotune.models.adapters import BASE, put_adapter, save, unproven
from zotune.models.loading import load_model
from zotune.models.schemes import get_scheme


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("partial")
    tiny.save_model(folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    tiny.causal_model(seed=1).save_pretrained(folder / "other")
    for name in ("bert", "llama"):
        families.save(name, folder / name)
    tiny.save_data(folder / "data", train=12, validation=6, test=8)
    return folder


def own(base: Path) -> list[str]:
    return ["--data", str(base / "data"), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS, "--device", "cpu"]


def trained(base: Path, out: Path, model: str = "model", **changes: object) -> Path:
    assert run(["train", *tiny.flags(base / model, base / "data", **changes), "--output", str(out)]) == 0
    return out / "model"


def line_of(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert run(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zotune:")]
    assert len(lines) == 1
    return lines[0]


def commands(base: Path, tmp_path: Path, model: Path, adapter: Path) -> dict[str, list[str]]:
    both = ["--model", str(model), "--adapter", str(adapter)]
    return {
        "eval": ["eval", *both, *own(base)],
        "predict": ["predict", *both, *own(base), "--output", str(tmp_path / "p.jsonl")],
        "merge": ["merge", *both, "--output", str(tmp_path / "merged")],
    }


def renamed(folder: Path, to: Path, change) -> Path:
    """A copy of a model's or adapter's folder whose tensors have other names; None: left out."""
    shutil.copytree(folder, to)
    file = next(to.glob("*model.safetensors"))
    tensors = {change(name): tensor for name, tensor in load_file(file).items() if change(name) is not None}
    save_file(tensors, file, {"format": "pt"})
    return to


@pytest.mark.parametrize("command", ["eval", "predict", "merge"])
def test_an_adapter_whose_keys_match_nothing_is_refused(base, tmp_path, capsys, command):
    adapter = trained(base, tmp_path / "run", scheme="lora")
    moved = renamed(adapter, tmp_path / "moved", lambda name: name.replace("model.layers", "transformer.h"))
    line = line_of(capsys, commands(base, tmp_path, base / "model", moved)[command])
    assert "no weights for base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in line
    assert "no place in the model for its base_model.model.transformer.h.0.self_attn.q_proj.lora_A" in line
    assert "and 6 more" in line
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "p.jsonl").exists()


def test_an_adapter_with_fewer_weights_than_its_config_says_is_refused(base, tmp_path, capsys):
    adapter = trained(base, tmp_path / "run", scheme="lora")
    cut = renamed(adapter, tmp_path / "cut", lambda name: None if "layers.1" in name else name)
    line = line_of(capsys, commands(base, tmp_path, base / "model", cut)["eval"])
    assert "no weights for base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight" in line


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
def test_an_adapter_on_another_base_of_the_same_shape_is_refused(base, tmp_path, capsys, scheme):
    adapter = trained(base, tmp_path / "run", scheme=scheme)
    for command, argv in commands(base, tmp_path, base / "other", adapter).items():
        if command != "merge" or scheme == "lora":
            line = line_of(capsys, argv)
            assert "it was trained on other weights than the model's, model.embed_tokens.weight differs" in line
            assert f"--model {base / 'model'}" in line
    assert run(commands(base, tmp_path, base / "model", adapter)["eval"]) == 0
    shutil.copytree(adapter, tmp_path / "free")
    (tmp_path / "free" / BASE).unlink()
    assert run(commands(base, tmp_path, base / "other", tmp_path / "free")["eval"]) == 0


@pytest.mark.parametrize("command", ["eval", "predict", "merge"])
def test_an_adapter_that_was_trained_with_more_tokens_is_refused(base, tmp_path, capsys, command):
    """The embedding has rows to spare for them, so nothing else shows it: the model's own tokenizer writes them as text."""
    adapter = trained(base, tmp_path / "run", scheme="lora")
    argv = commands(base, tmp_path, base / "model", adapter)[command]
    assert run(argv) == 0
    words = tf.AutoTokenizer.from_pretrained(adapter)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.save_pretrained(adapter)
    line = line_of(capsys, [*argv, "--overwrite"] if command != "eval" else argv)
    assert "its tokenizer has tokens that the model's has not (<|im_end|>, <|im_start|>)" in line


@pytest.mark.parametrize("named", ["other/base", None, "the model"])
def test_an_adapter_of_other_tools_is_said_to_be_of_unknown_weights(base, tmp_path, capsys, named):
    """PEFT keeps a name alone; mirrors have many, and a folder's says nothing of what is in it."""
    adapter = tmp_path / "adapter"
    get_scheme("lora").prepare(load_model(str(base / "model"))).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name = str(base / "model") if named == "the model" else named
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for argv in commands(base, tmp_path, base / "model", adapter).values():
        capsys.readouterr()
        assert run(argv) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert f"whether it was trained on the weights of {base / 'model'} is not known" in said
        assert (f"it names {name}, and" if name else "it names no model, and") in said
    assert unproven(str(adapter), "other/base") is None or named != "other/base"


@pytest.mark.parametrize("written", ["float32", "bfloat16", "float16"])
def test_a_base_is_known_in_every_dtype(base, tmp_path, written):
    model = get_scheme("lora").prepare(load_model(str(base / "model"), dtype=written))
    save(model, tiny.tokenizer(), tmp_path)
    for read in ("float32", "bfloat16", "float16"):
        put_adapter(load_model(str(base / "model"), dtype=read), str(tmp_path))


@pytest.mark.parametrize("name", [*families.CAUSAL, *families.MASKED])
@pytest.mark.parametrize("kind", ["", "classifier"])
def test_an_adapter_fits_the_base_that_it_was_made_on(tmp_path, name, kind):
    """In every family, with a head of its own or without."""
    model = families.build(name, kind)
    save(get_scheme("lora").prepare(model), tiny.tokenizer(), tmp_path)
    put_adapter(families.build(name, kind), str(tmp_path))


def test_a_classifier_s_adapter_names_its_kind_where_it_does_not_fit(base, tmp_path, capsys):
    model = load_model(str(base / "llama"), kind="classifier", labels=["0", "1"])
    get_scheme("lora").prepare(model).save_pretrained(tmp_path / "adapter")  # as PEFT alone writes it: no config.json
    line = line_of(capsys, commands(base, tmp_path, base / "llama", tmp_path / "adapter")["eval"])
    assert "--model-kind classifier" in line


@pytest.mark.parametrize("kind", ["masked", "classifier"])
@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_backbone_whose_keys_do_not_match_is_refused(base, tmp_path, capsys, kind, command):
    """Any kind: a classifier may lack its head, not what it reads with."""
    moved = renamed(base / "bert", tmp_path / "bert", lambda name: f"module.{name}")
    flags = ["--model", str(moved), *own(base), "--model-kind", kind]
    out = ["--output", str(tmp_path / "run"), "--steps", "2"] if command == "train" else []
    line = line_of(capsys, [command, *flags, *out])
    assert "loads in part: its checkpoint has no weights for bert.embeddings.LayerNorm" in line
    assert "it holds module.bert.embeddings.LayerNorm" in line
    assert "which fit nowhere" in line


def test_a_causal_backbone_whose_keys_do_not_match_is_refused(base, tmp_path, capsys):
    moved = renamed(base / "model", tmp_path / "model", lambda name: name.replace("model.layers", "decoder.blocks"))
    line = line_of(capsys, ["eval", "--model", str(moved), *own(base)])
    assert "no weights for model.layers.0.input_layernorm.weight" in line
    assert "it holds decoder.blocks.0.input_layernorm.weight" in line


def test_a_checkpoint_of_more_layers_than_its_config_is_refused(base, tmp_path, capsys):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    line = line_of(capsys, ["eval", "--model", str(folder), *own(base)])
    assert "has no place for model.layers.1.input_layernorm.weight" in line


def test_a_checkpoint_with_biases_that_its_config_denies_is_refused(base, tmp_path, capsys):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    line = line_of(capsys, ["eval", "--model", str(folder), *own(base)])
    assert "has no place for model.layers.0.self_attn.q_proj.bias" in line


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_head_that_was_never_trained_is_for_training_alone(base, tmp_path, capsys, name):
    flags = ["--model", str(base / name), *own(base), "--model-kind", "classifier"]
    for command, out in (("eval", []), ("predict", ["--output", str(tmp_path / "p.jsonl")])):
        line = line_of(capsys, [command, *flags, *out])
        assert "its head was never trained" in line
        assert ("bert.pooler.dense.bias" if name == "bert" else "score.weight") in line
    capsys.readouterr()
    model = trained(base, tmp_path / "run", name, model_kind="classifier", steps=2, eval_every=2)
    told = capsys.readouterr()
    assert "the model has no trained head" in told.out + told.err
    assert run(["eval", "--model", str(model), *own(base)]) == 0
    adapter = trained(base, tmp_path / "lora", name, model_kind="classifier", steps=2, eval_every=2, scheme="lora")
    for argv in commands(base, tmp_path, base / name, adapter).values():
        assert run(argv) == 0
    trajectory = ["--model", str(base / name), "--trajectory", str(tmp_path / "run" / "trajectory.zot")]
    assert run(["eval", *trajectory, *own(base)]) == 0


def test_a_head_that_was_trained_for_tokens_is_none_for_texts(base, tmp_path, capsys):
    """It fits by name and shape."""
    torch.manual_seed(0)
    config = tf.AutoConfig.from_pretrained(base / "bert")
    tf.BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    families.tokenizer("bert").save_pretrained(tmp_path / "tokens")
    flags = ["--model", str(tmp_path / "tokens"), *own(base), "--model-kind", "classifier"]
    assert "its head was never trained" in line_of(capsys, ["eval", *flags])


def test_tied_adapters_that_are_saved_once_load(base, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 9])
    peft.get_peft_model(tiny.causal_model(), config).save_pretrained(tmp_path)
    put_adapter(tiny.causal_model(), str(tmp_path))
