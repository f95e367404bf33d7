"""Runs of an older zotune (0.1.0 before places, commit f847c3f): their files mean today what they meant then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf

from zotune.cli.app import run
from zotune.record.replay import rebuild
from zotune.record.trajectory import read_file

FROZEN = Path(__file__).parent / "frozen"
CLOSE = {"rel": 1e-5, "abs": 1e-6}  # another processor's products may round otherwise


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Where the runs' model and data are, under the names that their options have."""
    monkeypatch.chdir(tmp_path)
    tiny.save_model(Path("model"))
    tiny.save_data(Path("data"))
    return tmp_path


def sums(model: torch.nn.Module) -> dict[str, list[float]]:
    named = ((name, p.detach().double()) for name, p in model.named_parameters() if p.requires_grad)
    return {name: [float(p.sum()), float(p.square().sum())] for name, p in named}


def same(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> bool:
    return found.keys() == wanted.keys() and all(found[n] == pytest.approx(wanted[n], **CLOSE) for n in wanted)


@pytest.mark.parametrize("name", ["queries", "one-sided", "lora", "rank"])
def test_a_trajectory_of_before_gives_the_weights_that_it_gave(here, name):
    """Two directions for each row, rounded once a query then; one-sided differences, a forward each; momentum through LoRA; 16 rows
    at rank 16 in bfloat16, of which a rank of 128 was rounded at a time.
    """
    wanted = json.loads((FROZEN / f"{name}.json").read_text(encoding="utf-8"))
    load = lambda dtype: tf.AutoModelForCausalLM.from_pretrained("model", dtype=getattr(torch, dtype)).eval()  # noqa: E731
    model, trajectory, steps, _ = rebuild(load, str(FROZEN / f"{name}.zot"), wanted["until"])
    assert steps == wanted["steps"] == 6
    assert "forward_tokens" not in trajectory.header.method_options
    assert same(sums(model), wanted["sums"])


def test_a_run_of_before_that_was_stopped_goes_on_to_where_it_would_have_ended(here, capsys):
    shutil.copytree(FROZEN / "cut", "cut")
    before = Path("cut/trajectory.zot").read_bytes()
    flags = tiny.flags(Path("model"), Path("data"), eval_every=3, scheme="lora", method="zo-sgd-mmt")
    assert run(["train", *flags, "--output", "cut", "--resume"]) == 0, capsys.readouterr().err
    result = json.loads(Path("cut/result.json").read_text(encoding="utf-8"))
    assert (result["steps"], result["resumed_at"], result["forward_passes"]) == (6, [3], 12)
    assert Path("cut/trajectory.zot").read_bytes().startswith(before)
    written, whole = (read_file(path) for path in (Path("cut/trajectory.zot"), FROZEN / "lora.zot"))
    assert written.header == read_file(FROZEN / "cut" / "trajectory.zot").header
    for ours, theirs in zip(written.records, whole.records, strict=True):
        assert ours.g == pytest.approx(theirs.g, rel=1e-2, abs=1e-3)
        assert ours.loss_plus == pytest.approx(theirs.loss_plus, rel=1e-5)


def test_options_of_before_are_another_run_s_only_where_they_differ(here, capsys):
    shutil.copytree(FROZEN / "cut", "cut")
    flags = tiny.flags(Path("model"), Path("data"), eval_every=3, scheme="lora", method="zo-sgd-mmt", queries=2)
    assert run(["train", *flags, "--output", "cut", "--resume"]) == 2
    assert "queries was 1, is 2" in capsys.readouterr().err
