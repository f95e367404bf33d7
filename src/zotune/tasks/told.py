"""What is told of each row that a model was asked: the best label and its scores, the answer, or how well the text is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from zotune.tasks.encoding import Encoded
from zotune.tasks.evaluation import Outcome
from zotune.tasks.files import own_score
from zotune.tasks.metrics import TEXT_METRICS, best, text_f1
from zotune.tasks.task import Example, Task


def told(task: Task, examples: Sequence[Example], found: Outcome) -> Iterator[dict[str, Any]]:
    """A row each: `label`, `scores` and `probability`; or `answer`; or `loss` in nats a token and `perplexity`."""
    for loss in found.losses:
        yield {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # beyond it is no number
    for answer in found.answers:
        yield {"answer": answer}
    for example, scores in zip(examples if found.scores else [], found.scores, strict=True):
        names, chosen = names_of(task, example), best(scores)
        yield {
            "label": names[chosen],
            "scores": dict(zip(names, scores, strict=True)),
            "probability": _softmax(scores)[chosen],
        }


def names_of(task: Task, example: Example) -> list[str]:
    """What the candidates of a row are called: labels, the answers that they stand for, or their texts."""
    return list(task.labels) or list(example.names) or [text.strip() for text in example.candidates]


def right_of(task: Task, example: Example) -> str | None:
    """The right label, or the first of the right answers; None where nothing is right or wrong."""
    if task.models:
        return None
    if task.generates:
        return next(iter(example.golds or example.candidates), None)
    return None if example.label is None else names_of(task, example)[example.label]


def row_scores(metric: str, found: Outcome, rows: Sequence[Encoded]) -> list[float] | None:
    """What each row adds to a metric that is the mean over rows, 0 to 1 (a function's own unit); None where it is no mean."""
    if metric == "accuracy":
        return [float(best(s) == row.label) for s, row in zip(found.scores, rows, strict=True)]
    if metric == "record_f1":
        return [text_f1(row.names[best(s)], row.golds) for s, row in zip(found.scores, rows, strict=True)]
    if metric in TEXT_METRICS:
        return [TEXT_METRICS[metric](answer, row.golds) for answer, row in zip(found.answers, rows, strict=True)]
    if ":" in metric:
        score, asked = own_score(metric, "metric"), zip(found.prompts, found.answers, rows, strict=True)
        return [float(score(prompt, answer, row.golds)) for prompt, answer, row in asked]
    return None


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
