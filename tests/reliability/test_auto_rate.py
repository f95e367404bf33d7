"""`--lr auto` in a run: recorded, resumed to the bit, said; and what a run takes where nothing of its steps is given."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from faults import KilledAtStep
from processes import assert_same, outcome, zotune

from zotune import ZOTrainer, ZOTrainingArguments
from zotune.cli.app import run
from zotune.errors import InputError
from zotune.options import TrainConfig, resolve
from zotune.options.defaults import BY_DEVICE, by_default
from zotune.prepare.prepared import _rounding
from zotune.record.trajectory import read_file

AUTO = {"lr": "auto", "method": "leave-one-out", "queries": 4, "groups": "batch", "eps": "1e-3"}


@pytest.mark.parametrize(
    ("changes", "killed"),
    [
        (AUTO, (1, 2, 9)),
        (AUTO | {"dtype": "bfloat16", "accumulate": 2}, (4,)),
        ({"lr": "auto", "method": "zo-sgd", "blocks": "transformer", "lr_schedule": "cosine"}, (5,)),
        (AUTO | {"method": "own-inputs", "queries": 2}, (2, 8)),
    ],
    ids=str,
)
def test_a_killed_run_finds_the_rates_of_a_whole_one(flags, tmp_path, changes, killed):
    """Behind a checkpoint and before the first, by the record or by steps taken again."""
    argv = flags(**changes)
    assert zotune([*argv, "--output", str(tmp_path / "whole")], tmp_path / "said").code == 0
    whole = outcome(tmp_path / "whole")
    again, said = [*argv, "--output", str(tmp_path / "cut"), "--resume"], tmp_path / "cut.said"
    for step in killed:
        assert zotune(again, said, KilledAtStep(step, "after")).code == -9
    done = zotune(again, said)
    assert done.code == 0, done.said
    assert_same(tmp_path / "cut", whole)


def test_the_rate_is_said_and_recorded(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run([*flags(**AUTO, log_every=1), "--output", str(folder)]) == 0
    said = capsys.readouterr().err + capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    records = read_file(folder / "trajectory.zot").records
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (kept["lr"], kept["lr_schedule"]) == ("auto", "linear")
    assert f"lr auto: {records[0].lr[0]:.3g} at step 1 of 16" in said
    falls = [1 - k / 16 for k in range(16)]
    far = math.sqrt(sum(record.lr[0] ** 2 for record in records) / sum(f * f for f in falls))
    assert result["lr"] == pytest.approx(far, rel=1e-6)
    assert [line["lr"] for line in lines if "loss" in line] == pytest.approx([r.lr[0] for r in records])
    assert result["forward_passes"] == 16 * 4  # a rate costs none
    assert all(record.lr[0] > 0 for record in records)


@pytest.mark.slow
def test_it_trains_as_well_as_the_best_of_five_rates(flags, tmp_path):
    """A tiny model that knows nothing: its loss after 60 steps, beside a grid around what was found."""

    def end(name, lr):
        changes = AUTO | {"lr": lr, "steps": 60, "eval_every": 60, "save_every": 60, "loss": "candidates", "queries": 8}
        folder = tmp_path / name
        assert run([*flags(**changes, lr_schedule="linear", log_every=10), "--output", str(folder)]) == 0
        losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in losses if "loss" in line][-1], json.loads(
            (folder / "result.json").read_text()
        )["lr"]

    found, rate = end("auto", "auto")
    grid = [end(f"grid-{i}", f"{rate * c:.3g}")[0] for i, c in enumerate((1 / 16, 1 / 4, 1, 4, 16))]
    print(found, rate, grid)
    assert found < sorted(grid)[2]


@pytest.mark.parametrize(
    ("flags_", "said"),
    [
        (["--lr", "fast"], "--lr: 'fast': give a number from 0, or auto"),
        (["--lr", "-1"], "--lr: '-1': give a number from 0, or auto"),
        (["--lr", "auto", "--method", "zo-adam"], "--lr: lr='auto': is of updates that are lists of coefficients"),
        (["--lr", "auto", "--method", "fo-sgd"], "--lr: lr='auto'"),
    ],
)
def test_what_it_cannot_serve_is_refused_in_a_line(material, tmp_path, capsys, flags_, said):
    argv = ["train", *tiny.flags(*material, lr=None), *flags_, "--output", str(tmp_path / "run")]
    assert run(argv) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_search_is_of_numbers(material, tmp_path, capsys):
    argv = ["sweep", *tiny.flags(*material, lr="auto"), "--output", str(tmp_path / "sweep")]
    assert run(argv) == 2
    assert "--lr auto: a search tries numbers" in capsys.readouterr().err


def test_a_dry_run_takes_it(flags, tmp_path, capsys):
    assert run([*flags(**AUTO), "--dry-run", "--output", str(tmp_path / "run")]) == 0
    assert "lr: auto" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_trainer_takes_it_and_keeps_to_it(tmp_path, material):
    rows = [{"input_ids": [5, 6, 7 + i % 3], "labels": [5, 6, 7 + i % 3]} for i in range(16)]

    def trainer(lr, folder, resume=None, **more):
        args = ZOTrainingArguments(
            output_dir=str(folder), lr=lr, method="leave-one-out", queries=4, per_device_train_batch_size=4, max_steps=6,
            save_steps=3, logging_steps=1, report_to=[], use_cpu=True, **more,
        )  # fmt: skip
        made = ZOTrainer(tiny.causal_model(), args, train_dataset=rows)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = trainer("auto", tmp_path / "whole")
    rates = [line["learning_rate"] for line in whole.state.log_history if "loss" in line]
    assert whole.args.lr_scheduler_type == "linear"
    assert len(rates) == 6
    assert all(rate > 0 for rate in rates)
    assert rates[-1] < rates[1]
    again = trainer("auto", tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert p.equal(q)
    with pytest.raises(InputError, match="learning_rate='auto', the arguments say"):
        trainer(1e-3, tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-3"), lr_scheduler_type="linear")


# What a run takes for want of options.


def config(**given):
    return resolve(TrainConfig, {"model": "m", "task": "sst2", "output": "nowhere", "device": "cpu"} | given, None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_that_says_nothing_of_its_steps_takes_what_its_device_is_best_served_by(device):
    taken, made = BY_DEVICE[device], config(device=device)
    assert {name: getattr(made, name) for name in taken} == taken
    assert made.by_default == taken
    assert made.lr_schedule == ("linear" if taken.get("lr") == "auto" else "constant")
    assert config(device=device, lr_schedule="cosine").lr_schedule == "cosine"


@pytest.mark.parametrize(
    "given",
    [
        {"method": "zo-sgd"}, {"method": "leave-one-out"}, {"lr": "1e-4"}, {"eps": "1e-3"}, {"groups": "batch"}, {"queries": "2"},
        {"engine": "dual"}, {"sparsity": "0.5"}, {"scheme": "lora"}, {"loss": "accuracy"},
    ],
    ids=str,
)  # fmt: skip
def test_who_names_anything_of_a_step_has_the_methods_own_settings(given):
    made = config(device="cuda", **given)
    assert made.by_default == {}
    assert made.method == given.get("method", "zo-sgd")
    assert made.lr == (float(given["lr"]) if "lr" in given else None)
    assert made.eps == (float(given["eps"]) if "eps" in given else None)


def test_a_resumed_run_goes_on_with_what_it_began_with_on_whatever_device(tmp_path):
    cuda = {"model": "m", "device": "cuda", "output": str(tmp_path)}
    begun = config(**cuda).model_dump()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun))
    again = config(output=str(tmp_path), resume="true")
    assert {k: v for k, v in again.model_dump().items() if k not in ("device", "resume")} == {
        k: v for k, v in begun.items() if k not in ("device", "resume")
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "zo-sgd", "lr": 1e-5, "queries": 1, "groups": 1}))
    old = config(**cuda, resume="true")
    assert (old.method, old.lr, old.groups, old.lr_schedule) == ("zo-sgd", 1e-5, 1, "constant")
    assert by_default({"output": str(tmp_path), "device": "cuda"}) == BY_DEVICE["cuda"]


def rounding(dtype=torch.bfloat16, memory=80 << 30, device="cuda", placed=None, monkeypatch=None, **given):
    model = torch.nn.Linear(1 << 10, 1 << 10, dtype=dtype)  # 2 MiB in 16 bits
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    ready = SimpleNamespace(
        config=config(device=device, **given), device=torch.device(device), model=model, placed=placed
    )
    return _rounding(ready)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({}, "compensated"), ({"dtype": torch.float32}, "nearest"), ({"memory": 9 << 20}, "compensated"),
        ({"memory": 8 << 20}, "nearest"), ({"device": "cpu"}, "nearest"), ({"method": "leave-one-out"}, "nearest"),
        ({"weight_decay": 0.1}, "nearest"), ({"placed": "streams"}, "nearest"),
    ],
    ids=str,
)  # fmt: skip
def test_a_default_run_keeps_what_rounding_takes_of_16_bits_where_there_is_room(case, wanted, monkeypatch):
    assert rounding(monkeypatch=monkeypatch, **case) == wanted


def test_a_resumed_default_run_rounds_as_it_began(tmp_path):
    """A record from before there was a choice has the one there was."""
    for rounds in "compensated", "nearest":
        begun = config(device="cuda", output=str(tmp_path)).model_dump() | {"rounding": rounds}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun))
        assert config(output=str(tmp_path), resume="true").rounding == rounds


def test_the_table_of_defaults_is_said_in_a_line(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BY_DEVICE, "cpu", {"method": "leave-one-out", "queries": 2, "groups": "batch", "lr": "auto"})
    argv = ["train", *tiny.flags(*material, lr=None), "--output", str(tmp_path / "run")]
    assert run(argv) == 0
    said = capsys.readouterr()
    assert "--method leave-one-out --queries 2 --groups batch --lr auto --rounding nearest" in said.err + said.out
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {k: kept[k] for k in ("method", "queries", "groups", "lr")} == BY_DEVICE["cpu"]
