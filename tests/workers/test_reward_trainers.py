"""`RewardTrainer` of several processes: prompts of its own each, a step of all of them, and one voice."""

from __future__ import annotations

import pytest
import reward_trainers
from launch import told_by_two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reward-trainers")


@pytest.fixture(scope="module")
def told(folder):
    return told_by_two("reward_trainers.py", folder, "2 processes: a step has the rows of all, 2 of each")


@pytest.mark.parametrize("name", reward_trainers.KINDS)
def test_a_step_of_two_prompts_of_each_is_one_of_four(told, name, tmp_path):
    """To the bit, with the draws of one process, and in what is told of it; and both end with one model."""
    alone = reward_trainers.trained(tmp_path, 4, **reward_trainers.KINDS[name])
    for part in ("weights", "told", "held"):
        assert told[0][name][part] == alone[part], part
        assert told[1][name][part] == alone[part], part


@pytest.mark.parametrize("name", reward_trainers.KINDS)
def test_a_function_is_asked_for_each_answer_by_one_process(told, name):
    """12 prompts, of which a step has 4 for 4 members (8 where pairs are), and twice 3 held out."""
    steps, held = ([sum(n for n in one[name]["asked"] if (n == 3) == of) for one in told] for of in (False, True))
    assert steps == [24, 24]
    assert held == [6, 0]


def test_the_first_process_alone_saves(told, folder):
    saved = [sorted(p.name for p in folder.glob(f"*/saved-by-{rank}/*")) for rank in range(2)]
    assert "tokenizer.json" in saved[0]
    assert saved[1] == []
