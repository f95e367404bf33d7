"""Warnings come when they should, once, and not on a healthy run."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from zotune.cli.app import run
from zotune.run.guards import FLOAT32_EPS, WINDOW, Guards


def said(losses: list[tuple[float, float]]) -> list[str]:
    lines: list[str] = []
    guards = Guards(lines.append)
    for step, (plus, minus) in enumerate(losses, start=1):
        guards.see(step, plus, minus, [1.0])
    return lines


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([(1.0, 1.0 + FLOAT32_EPS)] * 3 * WINDOW, "--eps"),
        ([(1.0, 3.0)] * 3 * WINDOW, "smaller --eps"),
        ([(0.5, 0.51)] * WINDOW + [(2.0, 2.1)] * 2 * WINDOW, "risen from 0.505"),
    ],
)
def test_each_warning_is_said_once(losses, word):
    (line,) = said(losses)
    assert word in line


def test_a_loss_that_rises_within_the_first_steps_is_seen():
    (line,) = said([(0.5, 0.51), (3.0, 3.1)] + [(9.0, 9.2)] * 2 * WINDOW)
    assert "risen from 0.505 to 9.1; try a smaller --lr" in line


def test_probes_that_see_another_loss_than_the_weights_are_told_of_after_one_step():
    lines: list[str] = []
    for at_rest in (5.9, 2.0):
        guards = Guards(lines.append)
        guards.at_rest = at_rest
        guards.see(1, 6.0, 5.8, [1.0])
    assert lines == ["step 1: the probes' loss is 5.9 where the weights themselves have 2; try a smaller --eps"]


def test_a_healthy_run_says_nothing():
    assert said([(1.0 - i / 1000, 1.001 - i / 1000) for i in range(200)]) == []
    assert said([(1.0, 1.0)] * (WINDOW - 1)) == []


def test_statistics_are_since_the_last_call():
    guards = Guards(print)
    for g in (1.0, -3.0):
        guards.see(1, 1.0, 1.1, [g])
    assert guards.statistics() == {"g_mean_abs": 2.0, "g_sd": 2.0, "loss_apart": pytest.approx(0.1)}
    assert guards.statistics() == {}


@pytest.mark.parametrize(
    ("dtype", "eps", "warns"),
    [(torch.bfloat16, 1e-3, False), (torch.bfloat16, 1e-5, True), (torch.float16, 1e-5, False), (torch.float32, 1e-7, False),
     (torch.float32, 1e-10, True)],
)  # fmt: skip
def test_an_eps_that_the_weights_cannot_hold_is_said_before_the_first_step(dtype, eps, warns):
    lines: list[str] = []
    weights = 0.02 * torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    Guards(lines.append).weigh([weights.to(dtype), torch.zeros(0, dtype=dtype)], eps)
    assert len(lines) == warns
    assert not warns or "try a larger --eps" in lines[0]


def test_a_run_warns_and_writes_the_statistics(tmp_path, capsys):
    material = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data")
    flags = tiny.flags(*material, eps="1e-12", lr="0", steps=WINDOW + 2, eval_every=WINDOW)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("try a larger --eps") == 2  # before the first step, by the weights; then by the losses
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["g_mean_abs"] >= 0
    assert 0 <= line["loss_apart"] < 1e-5
