"""Warnings come when they should, once, and not on a healthy run."""

from __future__ import annotations

import json

import pytest
import tiny

from zotune.cli.app import run
from zotune.guards import FLOAT32_EPS, WINDOW, Guards


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


def test_a_healthy_run_says_nothing():
    assert said([(1.0 - i / 1000, 1.001 - i / 1000) for i in range(200)]) == []
    assert said([(1.0, 1.0)] * (WINDOW - 1)) == []


def test_statistics_are_since_the_last_call():
    guards = Guards(print)
    for g in (1.0, -3.0):
        guards.see(1, 1.0, 1.1, [g])
    assert guards.statistics() == {"g_mean_abs": 2.0, "g_sd": 2.0}
    assert guards.statistics() == {}


def test_a_run_warns_and_writes_the_statistics(tmp_path, capsys):
    material = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data")
    flags = tiny.flags(*material, eps="1e-12", lr="0", steps=WINDOW + 2, eval_every=WINDOW)
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("try a larger --eps") == 1
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["g_mean_abs"] >= 0
