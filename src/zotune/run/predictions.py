"""What the model made of each test row, before the first step and with the chosen one: predictions.jsonl of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from zotune.prepare.prepared import Prepared
from zotune.rewards.asking import Scores, Written
from zotune.rewards.builtin import ANSWER
from zotune.rewards.shown import number, said
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
    asked = [
        {
            "prompt": example.prompt
            or ready.tokenizer.decode(list(row.asked or row.candidates[0]), skip_special_tokens=True),
            "right": right_of(ready.task, example),
        }
        for example, row in zip(examples, ready.test, strict=True)
    ]
    each = zip(told(ready.task, examples, found), scores, strict=True)
    _write(folder, when, asked, [one | ({} if score is None else {"score": score}) for one, score in each])


def keep_answers(
    folder: RunFolder, when: str, written: Sequence[Written], scores: Scores, names: Sequence[str]
) -> None:
    """The same of a run on rewards: `answer`, its reward as `score`, what each function gave, tokens, and whether it ended."""
    asked = [
        {"prompt": said(one.prompt.prompt), "right": one.prompt.columns.get(ANSWER), "where": one.prompt.where}
        for one in written
    ]
    answers = [
        {
            "answer": one.text,
            "score": number(scores.total_n[i]),
            "rewards": {name: number(own_n[i]) for name, own_n in zip(names, scores.by_function_Fn, strict=True)},
            "tokens": len(one.ids),
            "finished": one.finished,
        }
        for i, one in enumerate(written)
    ]
    _write(folder, when, asked, answers)


def _write(folder: RunFolder, when: str, asked: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> None:
    known = _read(folder)
    known = known if len(known) == len(asked) else [{} for _ in asked]
    lines = [
        row | {time: line[time] for time in ("before", "after") if time in line} | {when: answer}
        for row, line, answer in zip(asked, known, answers, strict=True)
    ]
    write_atomically(folder / PREDICTIONS, "".join(as_json(line) + "\n" for line in lines))


def _read(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
