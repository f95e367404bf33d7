"""A trajectory and its base model give the run's weights, bit for bit; anything else is refused in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zotune import noise
from zotune.cli.app import run
from zotune.noise import reference

RUNS = [
    {"seed": 3},
    {"dtype": "bfloat16", "direction": "rademacher"},
    {"groups": "batch", "lr": "1e-3"},
    {"scheme": "lora"},
    {"scheme": "prefix", "lr": "1e-2"},
    {"scheme": "prompt", "lr": "1e-2"},
    {"scheme": "head", "lr": "1e-3"},
    {"method": "zo-adam", "lr": "1e-3"},
    {"method": "zo-sgd-mmt", "weight_decay": 0.1, "lr": "1e-3"},
    {"method": "zo-sgd-cons"},
    {"method": "zo-sgd-sign", "lr": "1e-4"},
    {"queries": 3, "lr_schedule": "linear"},
    {"estimator": "one-sided", "weight_decay": 0.5},
    {"blocks": "transformer", "lr": "1e-3"},
    {"sparsity": 0.5, "accumulate": 2},
    {"groups": "batch", "lr": "1e-3", "fold_every": 2},
    {"dtype": "bfloat16", "rounding": "compensated"},
    {"dtype": "bfloat16", "engine": "dual", "lr": "1e-3"},
]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return tiny.save_model(folder / "model"), tiny.save_data(folder / "data")


def train(material, output: Path, **changes: object) -> Path:
    assert run(["train", *tiny.flags(*material, **changes), "--output", str(output)]) == 0
    return output


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(next(p.glob("*.safetensors"))) for p in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def replay(material, output: Path, trajectory: Path, *more: str) -> int:
    flags = ["--model", str(material[0]), "--trajectory", str(trajectory), "--output", str(output), "--device", "cpu"]
    return run(["replay", *flags, *more])


@pytest.mark.parametrize("changes", RUNS, ids=lambda c: "-".join(map(str, c.values())))
def test_a_replay_gives_the_bits_of_the_run(material, tmp_path, changes, capsys):
    done = train(material, tmp_path / "run", **changes)
    assert replay(material, tmp_path / "again", done / "trajectory.zot") == 0
    assert "bit for bit" in capsys.readouterr().out
    assert same_weights(done / "model", tmp_path / "again")


def test_any_step_can_be_had(material, tmp_path, capsys):
    done = train(material, tmp_path / "run", steps=6, eval_every=6)
    short = train(material, tmp_path / "short", steps=3, eval_every=3)
    assert replay(material, tmp_path / "three", done / "trajectory.zot", "--until", "3") == 0
    assert same_weights(short / "model", tmp_path / "three")
    assert replay(material, tmp_path / "last", done / "trajectory.zot", "--until", "last") == 0
    assert same_weights(done / "model", tmp_path / "last")
    capsys.readouterr()
    assert replay(material, tmp_path / "x", done / "trajectory.zot", "--until", "7") == 2
    assert "holds 0 to 6" in capsys.readouterr().err
    assert replay(material, tmp_path / "last", done / "trajectory.zot") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_trajectory_is_scored_without_a_saved_model(material, tmp_path, capsys):
    done = train(material, tmp_path / "run")
    common = ["--data", str(material[1]), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS, "--device", "cpu"]
    figures = []
    for which in (
        ["--model", str(done / "model")],
        ["--model", str(material[0]), "--trajectory", str(done / "trajectory.zot")],
    ):
        assert run(["eval", *which, *common, "--output", str(tmp_path / "f.json")]) == 0
        figures.append((tmp_path / "f.json").read_text())
    assert figures[0] == figures[1]


def test_another_base_model_is_refused(material, tmp_path, capsys):
    done = train(material, tmp_path / "run")
    other = shutil.copytree(material[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert replay((other, None), tmp_path / "out", done / "trajectory.zot") == 2
    assert "its weights differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damage_and_other_noise_are_refused(material, tmp_path, capsys, monkeypatch):
    done = train(material, tmp_path / "run")
    bytes_ = bytearray((done / "trajectory.zot").read_bytes())
    bytes_[-60] ^= 1
    (tmp_path / "bad.zot").write_bytes(bytes_)
    assert replay(material, tmp_path / "out", tmp_path / "bad.zot") == 2
    assert "check sum" in capsys.readouterr().err
    assert replay(material, tmp_path / "out", tmp_path / "bad.zot", "--until", "1") == 0
    monkeypatch.setattr(noise, "NOISE_VERSION", 2)
    capsys.readouterr()
    assert replay(material, tmp_path / "out2", done / "trajectory.zot") == 2
    assert "noise definition 1" in capsys.readouterr().err


@pytest.mark.parametrize("direction", noise.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_steps_in_a_pass_are_the_steps_one_by_one(direction, dtype, monkeypatch):
    monkeypatch.setattr(noise, "STEPS_PART", 1000)
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(71, 73, generator=draw).to(dtype)
    seeds, coefs = torch.randint(1 << 40, (5, 2), generator=draw), torch.randn(5, 2, generator=draw) / 100
    one_by_one = w.clone()
    for seeds_Q, coefs_Q in zip(seeds, coefs, strict=True):
        noise.add_noise(one_by_one, one_by_one, seeds_Q, coefs_Q, 7, direction)
    noise.add_noise_steps(w, seeds, coefs, 7, direction)
    assert torch.equal(w, one_by_one)
    exact = torch.zeros(71, 73, dtype=torch.float64)
    reference.add_noise(exact, exact, seeds.view(-1), coefs.view(-1), 7, direction)
    assert exact.abs().max() > 0
