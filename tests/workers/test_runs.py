"""`zotune train` by two workers: the files of one process, one folder, and one line for whatever is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from launch import HERE, assert_said_once, told_by_two

import zotune
from zotune.record.trajectory import read_file

sys.path.insert(0, str(HERE.parent / "reliability"))
from processes import assert_same, outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("workers")
    tiny.save_model(made / "model")
    tiny.save_data(made / "data", train=20, validation=6, test=6)
    tiny.save_data(made / "fewer", train=19, validation=6, test=6)
    tiny.causal_model(seed=1).save_pretrained(made / "other")
    tiny.tokenizer(bos=True).save_pretrained(made / "other")
    return made


@pytest.fixture(scope="module")
def told(folder) -> list[dict[str, Any]]:
    """What each of two workers saw of each run."""
    return told_by_two("runs.py", folder)


def of_one_process(folder: Path, **changes: Any) -> dict[str, Any]:
    zotune.train(output=str(folder / "alone"), overwrite=True, **runs.options_of(folder, **changes))
    return outcome(folder / "alone")


@pytest.mark.parametrize("name", runs.PLAIN)
def test_files_are_those_of_one_process(folder, told, name):
    assert [one[name]["code"] for one in told] == [0, 0], told
    assert_same(folder / name, of_one_process(folder, **runs.PLAIN[name]))


def test_all_stop_at_the_step_at_which_one_was_asked_to_and_one_process_goes_on(folder, told):
    assert [one["stopped"]["code"] for one in told] == [143, 143], told
    assert "stopped at step 4 of 6" in told[0]["stopped"]["message"]
    zotune.train(output=str(folder / "stopped"), resume=True, **runs.options_of(folder))
    assert_same(folder / "stopped", of_one_process(folder))


@pytest.mark.parametrize("name", ["unseen", "unseen folds"])
def test_a_worker_that_sees_no_checkpoint_replays_the_trajectory_onto_the_base(folder, told, name):
    assert [one[name]["code"] for one in told] == [0, 0], told
    assert "going on after step 4 of 6" in told[0][name]["said"]
    assert_same(folder / name, of_one_process(folder, **runs.UNSEEN[name]))


def test_a_method_whose_steps_need_their_rows_wants_a_checkpoint_that_all_see(told):
    assert [one["unseen rows"]["code"] for one in told] == [2, 2]
    assert (
        "checkpoint-4: not seen by this worker; --resume needs --output on a disk" in told[1]["unseen rows"]["message"]
    )


WRONG = {
    "options": (2, "worker 1 differs from worker 0: other --lr 0.5 for 0.01"),
    "data": (2, "worker 1 differs from worker 0: other data (rows"),
    "base": (2, "worker 1 differs from worker 0: other base weights"),
    "few": (2, "a step has 1 such piece for 2 workers"),
    "whole": (2, "--micro-batch: 2 workers share out a step's rows"),
    "first order": (2, "--method fo-sgd: 2 workers share out the places of zeroth-order steps"),
    "streams": (2, "--max-gpu-memory: 2 workers compare all weights"),
    "taken": (2, "holds a run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_once_before_anything_is_written(folder, told, name):
    assert_said_once(told, name, *WRONG[name])
    assert not (folder / f"wrong-{name.replace(' ', '-')}" / "config.yaml").exists()


def test_a_worker_without_memory_ends_the_run_with_a_line_of_its_own(folder, told):
    first, second = told[0]["memory"], told[1]["memory"]
    assert (first["kind"], second["kind"]) == ("Elsewhere", "WorkerError")
    assert second["message"].startswith("worker 1 ")
    assert "out of memory" in second["message"]
    assert "--micro-batch" in second["message"]
    assert first["code"] == second["code"] == 1


def test_a_worker_whose_weights_differ_is_found_before_the_step_that_compares_them(folder, told):
    assert [one["touched"]["code"] for one in told] == [1, 1]
    assert "worker 1 has other weights than worker 0" in told[0]["touched"]["message"]
    assert len(read_file(folder / "touched" / "trajectory.zot").records) == 4  # the step that was wrong, and no other


def test_only_the_first_worker_talks_and_says_how_many_there_are(told):
    assert any("2 workers share the steps" in line for line in told[0]["sgd"]["said"])
    assert told[1]["sgd"]["said"] == []
