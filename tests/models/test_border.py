"""Files that transformers, tokenizers, safetensors, torch and PEFT cannot read: one line that names the file, exit code 2."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.models.border import damaged, reading
from zotune.models.loading import load_weights
from zotune.models.schemes import get_scheme

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
WAYS = {
    "is empty": lambda data: b"",
    "is cut": lambda data: data[: len(data) * 2 // 3],
    "is a git-lfs pointer, not the file itself; run git lfs pull": lambda data: POINTER,
    "is a web page": lambda data: b"<!DOCTYPE html><html>",
    "fetch it again": lambda data: bytes(len(data)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("border")
    tiny.save_model(folder / "model")
    get_scheme("lora").prepare(tf.AutoModelForCausalLM.from_pretrained(folder / "model")).save_pretrained(
        folder / "adapter"
    )
    pickled = shutil.copytree(folder / "model", folder / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    tiny.save_data(folder / "data", train=8, validation=4, test=4)
    return folder


def flags_of(base: Path, what: str, folder: Path) -> list[str]:
    flags = ["--data", str(base / "data"), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS, "--device", "cpu"]
    if what == "adapter":
        return [*flags, "--model", str(base / "model"), "--adapter", str(folder)]
    return [*flags, "--model", str(folder), *["--allow-pickle"] * (what == "pickled")]


def line_of(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert run(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zotune:")]
    assert len(lines) == 1
    return lines[0]


FILES = [("model", name) for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")]
FILES += [("model", "generation_config.json"), ("adapter", "adapter_config.json")]
FILES += [("adapter", "adapter_model.safetensors"), ("pickled", "pytorch_model.bin")]


@pytest.mark.parametrize(("what", "file"), FILES)
def test_a_damaged_file_is_named_with_what_it_looks_like(base, tmp_path, capsys, what, file):
    for i, (looks, damage) in enumerate(WAYS.items()):
        folder = shutil.copytree(base / what, tmp_path / str(i))
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
        line = line_of(capsys, ["eval", *flags_of(base, what, folder)])
        if looks != "fetch it again" or file != "pytorch_model.bin":
            assert f"{file} " in line
        assert looks in line, (looks, line)


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_what_ends_an_adapter_s_answers_is_read_whole_or_not_at_all(base, tmp_path, capsys, command):
    folder = shutil.copytree(base / "adapter", tmp_path / "adapter")
    out = ["--output", str(tmp_path / "out")] if command == "merge" else []
    flags = flags_of(base, "adapter", folder)
    flags = flags if command == "eval" else ["--model", str(base / "model"), "--adapter", str(folder)]
    for written in (b"", b"{", b"[1]", b'{"eos_token_id": 1'):
        (folder / "generation_config.json").write_bytes(written)
        assert "generation_config.json " in line_of(capsys, [command, *flags, *out])


@pytest.mark.parametrize("command", ["train", "predict", "preview", "merge", "replay"])
def test_every_command_says_it_in_one_line(base, tmp_path, capsys, command):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(POINTER)
    flags = flags_of(base, "model", folder)
    if command == "merge":
        flags = ["--model", str(folder), "--adapter", str(base / "adapter")]
    if command == "replay":
        assert run(["train", *tiny.flags(base / "model", base / "data"), "--output", str(tmp_path / "run")]) == 0
        flags = ["--model", str(folder), "--trajectory", str(tmp_path / "run" / "trajectory.zot")]
    out = ["--output", str(tmp_path / "out")]
    if command == "preview":
        flags, out = [*flags[: flags.index("--device")], "--model", str(folder)], []
    assert "tokenizer.json is a git-lfs pointer" in line_of(capsys, [command, *flags, *out])
    assert not any(path.suffix for path in (tmp_path / "out").glob("*"))


def test_pickles_that_are_no_weights_are_refused(base, tmp_path, capsys):
    folder = shutil.copytree(base / "pickled", tmp_path / "model")
    flags = ["eval", *flags_of(base, "pickled", folder)]
    for value in ({"a": 1}, [1, 2], "text"):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(value))
        assert str(folder) in line_of(capsys, flags)
        torch.save(value, folder / "pytorch_model.bin")
        assert str(folder) in line_of(capsys, flags)
    torch.save({"model": load_file(base / "model" / "model.safetensors")}, folder / "pytorch_model.bin")
    assert "loads in part" in line_of(capsys, flags)


def test_a_missing_shard_is_named(base, tmp_path, capsys):
    model = tf.AutoModelForCausalLM.from_pretrained(base / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny.tokenizer(bos=True).save_pretrained(tmp_path / "sharded")
    gone = sorted((tmp_path / "sharded").glob("model-*"))[1]
    gone.unlink()
    line = line_of(capsys, ["eval", *flags_of(base, "model", tmp_path / "sharded")])
    assert f"model.safetensors.index.json names {gone.name}, which is not there" in line


def test_a_model_without_a_tokenizer_says_so(base, tmp_path, capsys):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in it" in line_of(capsys, ["eval", *flags_of(base, "model", folder)])


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 48},
        {"num_hidden_layers": "two"},
        {"hidden_act": "nope"},
        {"model_type": "nope"},
        {"vocab_size": 9},
    ],
)
def test_a_config_that_makes_no_model_of_these_weights_is_one_line(base, tmp_path, capsys, change):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    line = line_of(capsys, ["eval", *flags_of(base, "model", folder)])
    assert not line.endswith(":")


def test_what_is_no_fault_of_a_file_passes_the_border():
    for error in (MemoryError(), OSError(28, "No space left on device"), torch.OutOfMemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), reading("--model x"):
            raise error
    with pytest.raises(InputError, match=r"^--model x: KeyError: 'y'$"), reading("--model x"):
        raise KeyError("y")
    with pytest.raises(InputError, match=r"^--model x: AssertionError$"), reading("--model x"):
        raise AssertionError
    with pytest.raises(InputError, match=r"^--model x: Errors: the first$"), reading("--model x"):
        raise RuntimeError("Errors:\n  the first\n  the second")


def test_a_checkpoint_that_lacks_tensors_of_the_model_is_not_loaded(tmp_path):
    """Tied ones are saved once. Nothing is copied of one that does not fit."""
    from safetensors.torch import save_file

    model, other = tiny.causal_model(), tiny.causal_model(seed=1)
    other.save_pretrained(tmp_path)
    assert load_weights(model, tmp_path)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    fresh = tiny.causal_model()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no weights for model.norm.weight"):
        load_weights(fresh, tmp_path)
    save_file(tensors | {"model.norm.weight": norm, "extra": norm.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no place for extra"):
        load_weights(fresh, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors is empty"):
        load_weights(fresh, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_sound_folders_have_no_damage(base):
    assert [damaged(base / name) for name in ("model", "adapter", "pickled")] == [None] * 3
    assert damaged("no/such-name") is None
