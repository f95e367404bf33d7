"""Steps that workers share are those of one process, bit for bit, whatever their number."""

from __future__ import annotations

import json
from typing import Any

import pytest
import steps
from launch import HERE, torchrun


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: steps.trained(None, **options) for name, options in steps.KINDS.items()}


def shared(workers: int, folder: Any) -> list[dict[str, Any]]:
    done = torchrun(workers, HERE / "steps.py", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]


def assert_alike(alone: dict[str, Any], told: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(told):
        for name, one in alone.items():
            own = {key: value for key, value in found[name].items() if key != "sent"}
            assert own == one, f"{name}, worker {rank} of {len(told)}"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return shared(2, tmp_path_factory.mktemp("two"))


def test_two_workers_take_the_steps_of_one_process(alone, two):
    assert_alike(alone, two)


@pytest.mark.slow
def test_four_workers_take_the_steps_of_one_process(alone, tmp_path):
    assert_alike(alone, shared(4, tmp_path))


def test_what_travels_is_counted(two):
    """A head of 16 bytes; then 16 for each place that rows share, and 4 for each row at each of its own places."""
    sent = {name: one["sent"] for name, one in two[0].items()}
    assert sent["zo-sgd"] == sent["zo-adam"] == sent["lowrank"] == 16 + 2 * 16
    assert sent["leave-one-out"] == 16 + 3 * 16
    rows = 4  # of 7 in pieces of 2 and 1: the first worker's share is the larger
    assert sent["rows with queries"] == 16 + 4 * rows * 4
    assert sent["rows, leave-one-out"] == 16 + 3 * rows * 4
