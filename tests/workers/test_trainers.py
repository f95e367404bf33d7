"""`ZOTrainer` of several processes keeps the Trainer's convention: a batch a process, a step of all of them."""

from __future__ import annotations

import pytest
import trainers
from launch import told_by_two


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    says = "2 processes: a step has the rows of all, 2 of each"
    return told_by_two("trainers.py", tmp_path_factory.mktemp("trainers"), says)


@pytest.mark.parametrize("name", trainers.KINDS)
def test_all_processes_end_with_one_model(told, name):
    assert told[0][name]["weights"] == told[1][name]["weights"]
    assert told[0][name]["saved"]


@pytest.mark.parametrize("name", ["row losses", "rows with directions"])
def test_a_step_of_two_rows_of_each_is_one_of_four(told, name, tmp_path):
    alone = trainers.trained(tmp_path, 4, **trainers.KINDS[name])
    assert told[0][name]["weights"] == alone["weights"]
