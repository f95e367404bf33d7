"""--save-every, --keep, --sync-every, --deterministic."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from processes import outcome

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.options import TrainConfig, resolve
from zotune.prepare.listener import Listener
from zotune.prepare.prepared import Prepared
from zotune.record.trajectory import TrajectoryWriter
from zotune.run import train as runs
from zotune.run.trainer import TaskTrainer


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_checkpoints_are_written_every_so_often_and_the_newest_and_the_best_are_kept(flags, tmp_path, monkeypatch):
    scores = {5: 50.0, 10: 90.0, 15: 60.0, 20: 50.0, 25: 70.0, 27: 20.0}
    saved = []

    def score(ready, rows, listener, what):
        return next(found) if what == "validation" else 0.0

    found = iter(scores.values())
    monkeypatch.setattr(Prepared, "score", score)
    keep = runs.RunFolder.keep_checkpoints
    monkeypatch.setattr(
        runs.RunFolder, "keep_checkpoints", lambda self, *n: (saved.append(steps_saved(self.path)), keep(self, *n))
    )
    out = tmp_path / "run"
    argv = flags(steps=27, eval_every=5, save_every=8)
    assert run([*argv, "--keep", "2", "--output", str(out)]) == 0
    assert [steps[-1] for steps in saved] == [5, 8, 10, 16, 24, 27]  # 5 and 10: better than all before
    assert steps_saved(out) == [10, 24, 27]
    assert max(map(len, saved)) <= 4  # while one is written
    assert json.loads((out / "result.json").read_text())["chosen_step"] == 10
    best, chosen = (tf.AutoModelForCausalLM.from_pretrained(out / f) for f in ("checkpoint-10", "model"))
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), chosen.parameters(), strict=True))
    assert run([*argv, "--keep", "2", "--output", str(out), "--resume"]) == 0
    assert steps_saved(out) == [10, 24, 27]
    assert run([*argv, "--output", str(out), "--resume"]) == 0
    assert steps_saved(out) == []


def test_how_often_is_saved_changes_no_bit_of_a_run(flags, tmp_path):
    for name, often in (("a", {"save_every": 1, "keep": 3, "sync_every": 1}), ("b", {"save_every": 100})):
        assert run([*flags(**often), "--output", str(tmp_path / name)]) == 0
    a, b = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert all(a[part] == b[part] for part in ("weights", "metrics", "trajectory", "result"))


@pytest.mark.parametrize("every", [1, 4])
def test_the_trajectory_goes_to_the_disk_every_so_many_steps(flags, tmp_path, monkeypatch, every):
    """As a disk sees it: how many records are written when fsync is called on the file, checkpoints left out."""
    at: list[int] = []
    path = tmp_path / "run" / "trajectory.zot"
    size = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            at.append(path.stat().st_size)
        fsync(descriptor)

    append = TrajectoryWriter.append
    monkeypatch.setattr(TrajectoryWriter, "append", lambda s, r: (append(s, r), size.append(path.stat().st_size))[0])
    monkeypatch.setattr(os, "fsync", watched)
    argv = flags(steps=12, eval_every=100, save_every=100, sync_every=every)
    assert run([*argv, "--output", str(tmp_path / "run")]) == 0
    record = size[1] - size[0]
    start = size[0] - record
    assert {(s - start) // record for s in at} >= set(range(every, 13, every))
    assert {(s - start) // record for s in at} <= {0, *range(every, 13, every), 12, 13}


def test_a_deterministic_run_asks_torch_for_it_and_gives_the_same_bits_on_the_cpu(flags, tmp_path, monkeypatch):
    asked = []
    step = TaskTrainer.training_step
    monkeypatch.setattr(
        TaskTrainer,
        "training_step",
        lambda *args, **kw: (asked.append(torch.are_deterministic_algorithms_enabled()), step(*args, **kw))[1],
    )
    for name, extra in (("a", []), ("b", ["--deterministic"])):
        assert run([*flags(steps=4), *extra, "--output", str(tmp_path / name)]) == 0
    assert asked == [False] * 4 + [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()
    a, b = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert all(a[part] == b[part] for part in ("weights", "metrics", "trajectory"))


def test_tf32_is_asked_for_while_a_run_lasts(flags, tmp_path, monkeypatch):
    asked, matmul, step = [], torch.backends.cuda.matmul, TaskTrainer.training_step
    monkeypatch.setattr(TaskTrainer, "training_step", lambda *args: (asked.append(matmul.allow_tf32), step(*args))[1])
    for name, extra in (("a", []), ("b", ["--tf32"])):
        assert run([*flags(steps=2), *extra, "--output", str(tmp_path / name)]) == 0
    assert asked == [False] * 2 + [True] * 2
    assert not matmul.allow_tf32


def test_an_operation_that_has_no_deterministic_algorithm_is_named_in_a_line(flags, tmp_path):
    class Chance(Listener):
        def begin(self, what: str, total: int) -> None:
            torch.zeros(4).put_(torch.tensor([0]), torch.tensor([1.0]))

    flags = flags()[1:]
    given = {flag[2:].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    config = resolve(TrainConfig, given | {"output": str(tmp_path / "run"), "deterministic": True}, None)
    with pytest.raises(InputError, match=r"^--deterministic: put_ .*; run without it$"):
        runs.train(config, Chance())
    assert not torch.are_deterministic_algorithms_enabled()


class Executed:
    """What a stranger's pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["a pickle", "a cut file"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_s_state_that_is_not_numbers_is_a_line_and_is_not_executed(flags, tmp_path, name, damage, capsys):
    out = tmp_path / "run"
    argv = [*flags(steps=7, eval_every=5, save_every=5, keep=2), "--output", str(out)]
    assert run(argv) == 0
    weights = (out / "model" / "model.safetensors").read_bytes()
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoint-7")
    state = out / "checkpoint-5" / name
    state.write_bytes(pickle.dumps(Executed(tmp_path / "ran")) if damage == "a pickle" else state.read_bytes()[:-400])
    capsys.readouterr()
    assert run([*argv, "--resume"]) == 2
    assert "checkpoint-5: its state cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(out / "checkpoint-5")
    assert run([*argv, "--resume"]) == 0
    assert (out / "model" / "model.safetensors").read_bytes() == weights
