"""What the model made of each test row, before the first step and with the chosen one: predictions.jsonl of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from zotune.prepare.prepared import Prepared
from zotune.run.folder import RunFolder, as_json, write_atomically
from zotune.tasks.evaluation import Outcome
from zotune.tasks.told import right_of, row_scores, told

PREDICTIONS = "predictions.jsonl"


def keep(ready: Prepared, found: Outcome, folder: RunFolder, when: str) -> None:
    """A line a row: `prompt`, `right` (label or first right answer), and under `when`, "before" or "after", what is told of the
    row, with its `score` where the metric is a mean over rows. What the file says of the other time stays.
    """
    examples = ready.splits.test
    scores: Sequence[float | None] = row_scores(ready.task.metric, found, ready.test) or [None] * len(examples)
    known = _read(folder)
    known = known if len(known) == len(examples) else [{} for _ in examples]
    lines = [
        {
            "prompt": example.prompt
            or ready.tokenizer.decode(list(row.asked or row.candidates[0]), skip_special_tokens=True),
            "right": right_of(ready.task, example),
            **{time: line[time] for time in ("before", "after") if time in line},
            when: one | ({} if score is None else {"score": score}),
        }
        for example, row, line, one, score in zip(
            examples, ready.test, known, told(ready.task, examples, found), scores, strict=True
        )
    ]
    write_atomically(folder / PREDICTIONS, "".join(as_json(line) + "\n" for line in lines))


def _read(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
