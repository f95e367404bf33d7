"""SIGKILL at any moment: the run goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults import KilledAtStep
from processes import Zotune, assert_same, number, outcome, zotune

from zotune.record.trajectory import read_file

LONG = {"steps": 32, "eval_every": 7, "save_every": 6}
RUNS: list[dict[str, Any]] = [
    {"lr_schedule": "linear"},
    {"dtype": "bfloat16", "method": "zo-sgd-mmt", "lr": "1e-3", "weight_decay": 0.1},
    {"dtype": "float16", "method": "zo-adam", "lr": "1e-4"},
    {"scheme": "lora", "queries": 2},
    {"dtype": "bfloat16", "groups": "batch", "lr": "1e-3"},
    {"dtype": "float16", "sparsity": 0.5, "accumulate": 2, "lr": "1e-3"},
    {"method": "fo-adam", "lr": "1e-4"},
    {"scheme": "prefix", "method": "zo-sgd-cons", "dtype": "bfloat16"},
    {"method": "zo-sgd-sign", "blocks": "transformer", "lr": "1e-4"},
    {"hybrid": 0.5, "fo_lr": "1e-3", "lr": "1e-3"},
    {"estimator": "one-sided", "scheme": "head"},
    {"method": "forward-grad", "lr": "1e-3", "scheme": "prompt"},
]


def wait_for(path: Path, running: Zotune) -> None:
    while not path.exists() and running.running:
        time.sleep(0.002)


def whole_run(argv: list[str], folder: Path) -> tuple[dict[str, Any], float]:
    """What an uninterrupted run leaves, and its seconds from the first file on."""
    folder.parent.mkdir(exist_ok=True)
    started = Zotune([*argv, "--output", str(folder)], folder.with_suffix(".said"))
    wait_for(folder / "progress.json", started)
    began = time.monotonic()
    done = started.end()
    assert done.code == 0, done.said
    return outcome(folder), time.monotonic() - began


def killed_at_random(argv: list[str], folder: Path, whole: dict[str, Any], seconds: float, moments: list[float]) -> int:
    """Kills at the moments, parts of the whole run's time, each resumed. Returns how many hit a run before its end."""
    said, hits = folder.with_suffix(".said"), 0
    for moment in moments:
        started = Zotune([*argv, "--output", str(folder), "--resume"], said)
        wait_for(folder / "progress.json", started)
        time.sleep(moment * seconds)
        started.kill()
        hits += started.end().code == -9
    done = zotune([*argv, "--output", str(folder), "--resume"], said)
    assert done.code == 0, done.said
    assert_same(folder, whole)
    return hits


def trials(flags: Any, tmp_path: Path, kills: int, runs: list[dict[str, Any]], seed: int) -> int:
    """Each run of the list killed in turn, once and twice in turn, until so many kills; how many hit."""
    draw, known = random.Random(seed), []
    for i, changes in enumerate(runs):
        argv = flags(**(LONG | changes))
        known.append((argv, *whole_run(argv, tmp_path / f"whole-{i}")))
    moments = [draw.random() for _ in range(kills)]
    plan = []
    while moments:
        some = 1 + (len(plan) // len(runs) + len(plan)) % 2
        plan.append((known[len(plan) % len(runs)], moments[:some]))
        del moments[:some]

    def one(n: int) -> int:
        (argv, whole, seconds), some = plan[n]
        return killed_at_random(argv, tmp_path / f"{n}", whole, seconds, some)

    with ThreadPoolExecutor(number("AT_ONCE", 2)) as pool:
        return sum(pool.map(one, range(len(plan))))


@pytest.mark.slow
def test_runs_killed_at_20_random_moments_end_to_the_bits_of_whole_ones(flags, tmp_path):
    assert trials(flags, tmp_path, 20, RUNS[:7], seed=0) >= 12  # the others had ended before


CUDA_RUNS: list[dict[str, Any]] = [
    {"dtype": "bfloat16", "engine": "dual"},
    {"dtype": "bfloat16", "groups": "batch", "lr": "1e-3"},
    {
        "dtype": "bfloat16",
        "groups": "batch",
        "lr": "1e-3",
        "fold_every": 4,
        "steps": 32,
        "save_every": 6,
        "eval_every": 8,
    },
    {"dtype": "float16", "engine": "sequential", "queries": 2, "weight_decay": 0.1, "lr": "1e-3"},
    {"method": "zo-adam", "dtype": "bfloat16", "lr": "1e-4"},
    {"method": "zo-sgd-mmt", "lr": "1e-3", "scheme": "lora"},
    {"method": "fo-adam", "lr": "1e-4", "deterministic": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CUDA_RUNS, ids=lambda c: "-".join(map(str, c.values())))
def test_on_cuda_a_killed_run_ends_to_the_bits_of_a_whole_one(flags, tmp_path, changes):
    """Killed at a step behind a checkpoint, and at random after it. The first run of a kind compiles its kernels."""
    argv = [flag for flag in flags(**(LONG | changes | {"device": "cuda"})) if flag != "True"]
    whole, seconds = whole_run(argv, tmp_path / "whole")
    again, said = [*argv, "--output", str(tmp_path / "cut"), "--resume"], tmp_path / "said"
    if whole["trajectory"] is not None:
        assert zotune(again, said, KilledAtStep(10, "after")).code == -9
    killed_at_random(argv, tmp_path / "cut", whole, seconds, [0.3, 0.6])


@pytest.mark.soak
def test_soak_kills(flags, tmp_path):
    wanted, hits, seed = number("KILLS", 300), 0, number("SEED", 1)
    while hits < wanted:
        hits += trials(flags, tmp_path / f"{seed}", min(60, wanted - hits + 2), RUNS, seed)
        seed += 1
    print(f"\nkills at random moments: {hits}, of runs of {len(RUNS)} kinds; 0 differed from whole ones")


@pytest.mark.slow
@pytest.mark.parametrize(("save_every", "steps"), [(3, (5, 6, 10)), (5, (5, 6, 11))])
def test_a_run_killed_around_the_end_of_an_epoch_goes_on_with_the_same_rows(flags, tmp_path, save_every, steps):
    """20 rows, 4 a step: an epoch ends with step 5. Some from a checkpoint at that step, some from one before it."""
    argv = flags(steps=11, eval_every=4, save_every=save_every)
    whole, _ = whole_run(argv, tmp_path / "whole")
    moments = [(step, when) for step in steps for when in ("before", "after")]

    def one(moment: tuple[int, str]) -> None:
        step, when = moment
        folder = tmp_path / f"{step}-{when}"
        again = [*argv, "--output", str(folder), "--resume"]
        said = folder.with_suffix(".said")
        assert zotune(again, said, KilledAtStep(step, when)).code == -9
        reached = step - (when == "before")
        assert len(read_file(folder / "trajectory.zot").records) == reached
        if step == 6:  # without the trajectory's last steps, from the checkpoint alone
            newest = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
            size = (folder / "trajectory.zot").stat().st_size
            with open(folder / "trajectory.zot", "r+b") as file:
                file.truncate(size - 21 * (reached - newest))
            reached = newest
        done = zotune(again, said)
        assert done.code == 0, done.said
        assert_same(folder, whole)
        assert json.loads((folder / "result.json").read_text())["resumed_at"] == [reached]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, moments))


def test_two_resumptions_in_a_row_repeat_no_forward_pass_and_a_finished_run_is_left_alone(flags, tmp_path):
    argv = flags(save_every=100, eval_every=100)
    whole, _ = whole_run(argv, tmp_path / "whole")
    again, said = [*argv, "--output", str(tmp_path / "cut"), "--resume"], tmp_path / "said"
    for step in (4, 9):
        assert zotune(again, said, KilledAtStep(step, "after")).code == -9
    assert zotune(again, said, NoForward(9)).code == 0, said.read_text()
    assert "going on after step 9 of 16; 9 of them from the trajectory" in said.read_text()
    assert_same(tmp_path / "cut", whole)
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["resumed_at"] == [4, 9]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.name != ".lock"}
    done = zotune(again, said)
    assert done.code == 0
    assert "this run is finished; nothing to do" in done.said
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.name != ".lock"} == before


def test_updates_that_an_engine_held_back_when_the_run_was_killed_are_not_lost(flags, tmp_path):
    """Lines, evaluations and checkpoints fall on different steps: what each reads is current."""
    argv = flags(engine="dual", lr="1e-3", dtype="bfloat16", queries=2)
    whole, _ = whole_run(argv, tmp_path / "whole")

    def one(step: int) -> None:
        again, said = [*argv, "--output", str(tmp_path / f"{step}"), "--resume"], tmp_path / f"{step}.said"
        assert zotune(again, said, KilledAtStep(step, "after")).code == -9
        done = zotune(again, said)
        assert done.code == 0, done.said
        assert_same(tmp_path / f"{step}", whole)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, (4, 7)))


class NoForward:
    """Refuses to take a step that was taken before."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self) -> None:
        from zotune.step.optimizer import ZeroOrderOptimizer

        step = ZeroOrderOptimizer.step

        def new(optimizer: Any, closure: Any = None, **named: Any) -> Any:
            assert closure is None or optimizer.steps >= self.steps
            return step(optimizer, closure, **named)

        ZeroOrderOptimizer.step = new  # type: ignore[method-assign]


def test_a_run_without_its_base_model_is_not_gone_on_with(flags, tmp_path, material):
    import shutil

    import tiny

    shutil.copytree(material[0], tmp_path / "model")
    argv = [*flags(scheme="lora"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "run"), "--resume"]
    assert zotune(argv, tmp_path / "said", KilledAtStep(8, "after")).code == -9
    tiny.causal_model(seed=1).save_pretrained(tmp_path / "model")
    done = zotune(argv, tmp_path / "said")
    assert done.code == 2
    assert "its weights are not those that the run began with" in done.said
