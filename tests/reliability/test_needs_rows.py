"""A run whose updates are functions of its rows: its record gives no weights, and whoever wants them from it is told so."""

from __future__ import annotations

import json

import tiny
import yaml
from faults import KilledAtStep
from processes import assert_same, outcome, zotune

from zotune.cli.app import run
from zotune.record.trajectory import read_file

OWN = {"method": "own-inputs", "queries": 2, "lr": None, "dtype": "bfloat16"}


def test_a_killed_run_goes_on_from_its_checkpoint_alone(flags, tmp_path):
    """The steps behind it are evaluated again, and end as if nothing had been."""
    argv = flags(**OWN)
    assert zotune([*argv, "--output", str(tmp_path / "whole")], tmp_path / "said").code == 0
    whole = outcome(tmp_path / "whole")
    again, said = [*argv, "--output", str(tmp_path / "cut"), "--resume"], tmp_path / "cut.said"
    for step in (2, 8):
        assert zotune(again, said, KilledAtStep(step, "after")).code == -9
    done = zotune(again, said)
    assert done.code == 0, done.said
    assert "from the trajectory" not in done.said
    assert_same(tmp_path / "cut", whole)
    reached = json.loads((tmp_path / "cut" / "result.json").read_text())["resumed_at"][-1]
    assert 0 < reached < 8  # the last checkpoint's, of a step on which one is saved


def test_its_record_is_whole_and_refused_where_weights_are_wanted(flags, material, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run([*flags(**OWN, steps=4), "--output", str(folder)]) == 0
    result, header = json.loads((folder / "result.json").read_text()), read_file(folder / "trajectory.zot").header
    assert len(read_file(folder / "trajectory.zot").records) == 4
    assert result["forward_passes"] == 4 * 5
    assert header.method_options["groups"] == "batch"
    assert header.pairs == 2 * 4
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert {k: kept[k] for k in ("groups", "queries", "lr", "eps")} == {
        "groups": "batch",
        "queries": 2,
        "lr": 2e-3,
        "eps": 1e-2,
    }
    assert "groups" not in header.extra["command"]
    assert "zotune replay" not in (folder / "README.md").read_text()
    capsys.readouterr()
    model, trajectory = ["--model", str(material[0])], ["--trajectory", str(folder / "trajectory.zot")]
    data = ["--data", str(material[1]), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS]
    for command in (["replay", "--output", str(tmp_path / "again")], ["eval", *data]):
        assert run([*command, *model, *trajectory]) == 2
        said = capsys.readouterr().err.strip()
        assert "trajectory.zot: a step of own-inputs is a function of the run's rows too" in said
        assert said.count("\n") == 0
    assert not (tmp_path / "again").exists()


def test_what_the_method_brings_is_refused_where_it_cannot_be(flags, tmp_path, capsys):
    for changes, flag in (
        ({"groups": 1}, "--groups"),
        ({"scheme": "prompt"}, "--scheme"),
        ({"fold_every": 2, "eval_every": 4}, "--fold-every"),
        ({"sparsity": 0.5}, "--sparsity"),
    ):
        assert run([*flags(**(OWN | changes)), "--output", str(tmp_path / "run")]) == 2
        assert flag in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_head_alone_learns_by_it(flags, tmp_path):
    changes = {"scheme": "head", "lr": "0.03", "queries": 4, "dtype": "float32", "steps": 120, "eval_every": 60}
    assert run([*flags(**(OWN | changes), log_every=1, loss="candidates"), "--output", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
