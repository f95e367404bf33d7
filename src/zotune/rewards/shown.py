"""Some of a step's answers, as a line of completions.jsonl and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zotune.errors import plain
from zotune.rewards.asking import Scores, Written

CELL = 300  # characters of a text in the table


def samples(
    step: int, names: Sequence[str], written: Sequence[Written], scores: Scores, count: int
) -> list[dict[str, Any]]:
    """So many answers, spread over the rewards from the least to the most, each with what each function gave."""
    order = sorted(range(len(written)), key=lambda i: (_order(scores.total_n[i]), i))
    some = [order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(min(count, len(order)))]
    return [
        {
            "step": step,
            "member": written[i].member,
            "prompt": written[i].prompt.prompt,
            "completion": written[i].text,
            "reward": number(scores.total_n[i]),
            "rewards": {name: number(own_n[i]) for name, own_n in zip(names, scores.by_function_Fn, strict=True)},
            "tokens": len(written[i].ids),
            "finished": written[i].finished,
            **(
                {"extra": {name: _plain(values[i]) for name, values in scores.extra_n.items()}}
                if scores.extra_n
                else {}
            ),
        }
        for i in dict.fromkeys(some)
    ]


def table_of(step: int, shown: Sequence[dict[str, Any]]) -> Any:
    """A rich table of `samples`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"step {step}: some answers", title_justify="left", show_lines=True)
    table.add_column("prompt", overflow="fold", ratio=2)
    table.add_column("answer", overflow="fold", ratio=3)
    table.add_column("reward", justify="right")
    for one in shown:
        reward = "none" if one["reward"] is None else f"{one['reward']:.3g}"
        table.add_row(Text(_short(said(one["prompt"]))), Text(_short(one["completion"])), reward)
    return table


def said(prompt: Any) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


def _short(text: str) -> str:
    """The end of a long prompt tells more than its start does; lines stay."""
    text = "\n".join(map(plain, text.split("\n")))
    return text if len(text) <= CELL else "…" + text[-CELL:]


def _order(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _plain(value: Any) -> Any:
    """What JSON has no word for as text."""
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, (str, int, bool, type(None))) else repr(value)


def number(value: float) -> float | None:
    """As JSON has it: none for NaN."""
    return None if math.isnan(value) else value
