"""A task's metric on rows: candidates are scored, or answers generated and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from zotune.tasks.encoding import Encoded
from zotune.tasks.generation import generate_answers
from zotune.tasks.metrics import CHOICE_METRICS, TEXT_METRICS, text_metric
from zotune.tasks.scoring import score_rows
from zotune.tasks.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a model made of rows: the candidates' scores, or the answers that it wrote."""

    scores: list[list[float]]
    answers: list[str]

    def metric(self, name: str, rows: Sequence[Encoded]) -> float:
        """In percent."""
        if name in TEXT_METRICS:
            return text_metric(name, self.answers, rows)
        return CHOICE_METRICS[name](self.scores, rows)


def outcome(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Outcome:
    common: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id, "advance": advance}
    if task.generates:
        return Outcome([], generate_answers(model, tokenizer, rows, **common))
    return Outcome(score_rows(model, rows, **common), [])


def also(task: Task) -> list[str]:
    """Further metrics that a task's authors report beside its own."""
    return ["exact_match"] if task.metric == "f1" else []
