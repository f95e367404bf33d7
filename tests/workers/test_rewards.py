"""`zotune reward` by two workers: the files of one process, every prompt's rewards in them, and one line for whatever is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import reward_runs
import tiny
from launch import HERE, assert_said_once, told_by_two

import zotune

sys.path.insert(0, str(HERE.parent / "reliability"))
from processes import outcome

TIMES = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("workers")
    tiny.save_model(made / "model")
    rows = [{"prompt": f"the film {i} was {'good' if i % 2 else 'bad'}"} for i in range(22)]
    tiny.write_rows(made / "prompts.jsonl", rows)
    return made


@pytest.fixture(scope="module")
def told(folder) -> list[dict[str, Any]]:
    """What each of two workers saw of each run."""
    return told_by_two("reward_runs.py", folder)


def timeless(folder: Path) -> dict[str, Any]:
    """All of a run but times: weights and trajectory too, to the bit."""
    found = outcome(folder)
    for told in (found["result"], *found["metrics"]):
        told.pop("tokens_per_second", None)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", reward_runs.PLAIN)
def test_files_are_those_of_one_process(folder, told, name):
    assert [one[name]["code"] for one in told] == [0, 0], told
    alone = folder / "alone"
    zotune.reward(output=str(alone), overwrite=True, **reward_runs.options_of(folder, **reward_runs.PLAIN[name]))
    for file in ("steps.jsonl", "completions.jsonl", "predictions.jsonl"):
        assert lines(folder / name / file) == lines(alone / file), file
    assert timeless(folder / name) == timeless(alone)


def test_a_step_in_pieces_is_the_step_whole(folder, told):
    """Of the same members, prompts and draws; pieces share no forward, which may turn a last bit and no more."""
    whole = folder / "whole"
    changes = reward_runs.PLAIN["drawn"] | {"micro_batch": None}
    zotune.reward(output=str(whole), overwrite=True, **reward_runs.options_of(folder, **changes))
    pieces, steps = lines(folder / "drawn" / "steps.jsonl"), lines(whole / "steps.jsonl")
    assert len(pieces) == 5
    for one, other in zip(pieces, steps, strict=True):
        assert one == pytest.approx(other, rel=1e-6, nan_ok=True)


WRONG = {
    "options": (2, "worker 1 differs from worker 0: other --max-new-tokens 5 for 4"),
    "whole": (2, "--micro-batch: 2 workers share out a step's rows"),
    "few": (2, "a step has 1 such piece for 2 workers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_once_before_anything_is_written(folder, told, name):
    assert_said_once(told, name, *WRONG[name])
    assert not (folder / f"wrong-{name}" / "config.yaml").exists()


def test_a_function_that_fails_is_told_by_the_worker_whose_rows_it_failed_for(told):
    kinds = {one["fails"]["kind"] for one in told}
    assert "RewardError" in kinds
    said = next(one["fails"]["message"] for one in told if one["fails"]["kind"] == "RewardError")
    assert "reward fails: KeyError" in said
    assert [one["fails"]["code"] for one in told] == [1, 1]


def test_only_the_first_worker_talks_and_says_how_many_there_are(told):
    assert any("2 workers share the steps" in line for line in told[0]["drawn"]["said"])
    assert told[1]["drawn"]["said"] == []
