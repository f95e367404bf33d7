"""What an answer is worth: reward functions, by TRL's signature, and the prompts that they are of.

functions: a function of a name (`find`); builtin: those that zotune brings; models: a classifier as a function; gym: the tasks of
reasoning-gym; asking: functions asked about a step's answers, with their faults as one line; prompts: rows as what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The kinds of reward functions that a name gives by itself; whatever else has a colon is somebody's code.
KINDS = ("exact-match", "token-f1", "json", "length", "regex", "model", "gym")


def is_code(name: str) -> bool:
    """Whether the name is one of somebody's own code, which no file has imported.

    >>> is_code("regex:a+"), is_code("mine.py:score"), is_code("exact-match")
    (False, True, False)
    """
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind not in KINDS


class RewardError(RuntimeError):
    """A reward function failed: it raised, took too long, or gave no number for each answer. The run stops (exit code 1) and can be
    resumed. One line: which function, what, for which row and text."""


@dataclass(frozen=True)
class Reward:
    """A reward function and the name that it is shown under.

    call: TRL's signature, keywords `prompts`, `completions`, `completion_ids` (and `completions_ids`), `trainer_state`,
    `log_extra`, `log_metric`, every other column of the rows, and whatever may come; gives a number or None (not for this row) for
    each completion. It may be a coroutine.
    code: whether a name in a file would have had to import it.
    """

    name: str
    call: Callable[..., Any]
    code: bool = False
