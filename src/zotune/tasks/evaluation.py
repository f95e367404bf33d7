"""A task's metric on rows: candidates are scored, or answers generated and compared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import nn

from zotune.engines.attended import hiding_nothing
from zotune.tasks.encoding import Encoded
from zotune.tasks.files import own_score
from zotune.tasks.generation import answers_of
from zotune.tasks.metrics import CHOICE_METRICS, LIKELIHOOD, TEXT_METRICS, text_metric
from zotune.tasks.scoring import row_losses, score_rows
from zotune.tasks.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a model made of rows: the candidates' scores, the answers that it wrote, or nats a token of each row.

    prompts: what was answered, where a function of one's own is the metric. unended: answers that reached the most tokens.
    """

    scores: list[list[float]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    unended: int = 0

    def metric(self, name: str, rows: Sequence[Encoded]) -> float:
        """In percent, but for perplexity, loss, and the mean of a function of one's own, `package.module:function`."""
        if name in LIKELIHOOD:
            return min(LIKELIHOOD[name](self.losses, rows), sys.float_info.max)  # JSON has no infinity
        if ":" in name:
            score = own_score(name, "metric")
            told = zip(self.prompts, self.answers, rows, strict=True)
            return fmean(score(prompt, answer, row.golds) for prompt, answer, row in told)
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
    replies: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Outcome:
    """replies: of conversations, what the assistant would say next, instead of how well what it said is predicted.

    Raises NotFinite where the model gives something that is no number, of which no metric would mean anything.
    """
    common: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id, "advance": advance}
    with hiding_nothing(model.parameters()):
        if task.generates or (task.messages_field and replies):
            own = ":" in task.metric
            prompts = [tokenizer.decode(list(row.asked), skip_special_tokens=True) for row in rows] if own else []
            written = answers_of(
                model, tokenizer, rows, reply=not task.generates, end=task.end, most=task.max_new_tokens, **common
            )
            texts = [answer.text for answer in written]
            return Outcome(answers=texts, prompts=prompts, unended=sum(not answer.ended for answer in written))
        if task.models:
            return Outcome(losses=row_losses(model, rows, **common))
        return Outcome(scores=score_rows(model, rows, **common))


def also(task: Task) -> list[str]:
    """Further metrics that a task's authors report beside its own."""
    return {"f1": ["exact_match"], "perplexity": ["loss"]}.get(task.metric, [])
