"""Tasks of reasoning-gym (zotune[reward]): rows made by a seed, and the task's own score of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from zotune.errors import InputError, nearest
from zotune.rewards.builtin import text_of

GYM = "gym:"
ENTRY = "entry"  # the column that holds what the task's score wants


def gym_reward(name: str) -> Callable[..., Any]:
    """The task's score, 0 to 1, of the answer to one of its own rows (column `entry`)."""
    module, task, options = _module(), *_parsed(name)
    score = _dataset(module, task, options, 1, 0).score_answer

    def call(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        entries = columns.get(ENTRY) or [None] * len(completions)
        return [
            None if entry is None else float(score(answer=text_of(text).strip(), entry=json.loads(entry)))
            for text, entry in zip(completions, entries, strict=True)
        ]

    return call


def gym_rows(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` rows of `gym:TASK` or `gym:TASK?option=value&…` by the seed: prompt, answer, and what its score reads as JSON."""
    module, task, options = _module(), *_parsed(name.removeprefix(GYM))
    made = _dataset(module, task, options, size, seed)
    return [
        {
            "prompt": made[i]["question"],
            "answer": made[i]["answer"],
            ENTRY: json.dumps(made[i], default=str, allow_nan=False),
        }
        for i in range(size)
    ]


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    task, _, rest = name.partition("?")
    pairs = [part.partition("=")[::2] for part in rest.split("&") if part]
    options: dict[str, Any] = {}
    for key, value in pairs:
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return task, options


def _dataset(module: Any, task: str, options: dict[str, Any], size: int, seed: int) -> Any:
    known = list(module.factory.DATASETS)
    if task not in known:
        raise InputError(f"{GYM}{task}: reasoning-gym has no such task; {nearest(task, known)}")
    try:
        return module.create_dataset(task, size=size, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise InputError(f"{GYM}{task}: its options do not serve ({error})") from None


def _module() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(f"{GYM} needs reasoning-gym ({error}): install zotune[reward]") from None
    return reasoning_gym
