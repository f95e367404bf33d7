"""What a run minimises, by name: losses with a gradient, and objectives that have none.

answer        −log p of the answer's tokens                    candidates   cross-entropy over the candidates' scores
accuracy      1 where the wrong candidate scores highest       f1, exact_match   1 − the metric of the generated answer
package.module:function    −function(prompt, answer, golds), any Python function that scores a generated text
"""

# B rows.

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import InputError, nearest
from zotune.tasks.chat import end_marks
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.files import own_score
from zotune.tasks.generation import LINE, left_padded, write
from zotune.tasks.metrics import TEXT_METRICS
from zotune.tasks.scoring import ROW_LOSSES, candidate_scores
from zotune.tasks.task import Task

RowLoss = Callable[[nn.Module, Any], Tensor]
NAMES = (*ROW_LOSSES, "accuracy", *TEXT_METRICS)


@dataclass(frozen=True)
class Objective:
    """A loss of each row of a batch, how batches for it are made, and whether it has a gradient."""

    row_loss: RowLoss
    collate: Callable[[Sequence[Encoded]], dict[str, Any]]
    differentiable: bool


def check_name(name: str) -> str:
    """The name, if it is one of an objective. Raises ValueError that says what there is."""
    if name not in NAMES and ":" not in name:
        raise ValueError(f"unknown loss {name!r}; {nearest(name, NAMES)}, or package.module:function")
    return name


def generates(name: str) -> bool:
    """Whether the named objective scores what a model writes."""
    return name in TEXT_METRICS or ":" in name


def objective(name: str, task: Task, tokenizer: Any, pad_id: int, multiple: int = 1) -> Objective:
    """The named objective for a task. Raises InputError where the two do not go together."""
    if name in ROW_LOSSES:
        if name == "candidates" and (task.generates or task.models):
            raise InputError(f"--loss candidates: task {task.name!r} has no candidates to choose from; use answer")
        return Objective(ROW_LOSSES[name], Collator(name, pad_id, multiple), True)
    if name == "accuracy":
        if task.generates or task.models:
            other = "f1 or exact_match" if task.generates else "answer"
            raise InputError(f"--loss accuracy: task {task.name!r} has no candidates to choose from; use {other}")
        return Objective(error_rate, Collator("candidates", pad_id, multiple), False)
    if name in TEXT_METRICS and not task.generates:
        other = "answer" if task.models else "accuracy"
        raise InputError(f"--loss {name}: task {task.name!r} generates no answers to compare; use {other}")
    if task.text_field:
        raise InputError(f"--loss {name}: task {task.name!r} is plain text, which asks nothing; use answer")
    if name in TEXT_METRICS:
        score: Callable[[str, str, Sequence[str]], float] = lambda prompt, text, golds: TEXT_METRICS[name](text, golds)  # noqa: E731
        offset = 1.0
    else:
        score, offset = own_score(name, "--loss"), 0.0
    row_loss = functools.partial(
        generated_losses,
        tokenizer=tokenizer,
        pad_id=pad_id,
        score=score,
        offset=offset,
        reply=bool(task.messages_field),
        end=task.end if task.generates else LINE,
        most=task.max_new_tokens,
        more_ends=end_marks(tokenizer) if task.messages_field and tokenizer is not None else (),
    )
    return Objective(row_loss, functools.partial(_prompts, tokenizer=tokenizer, pad_id=pad_id), False)


def error_rate(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B,): 0 where the right candidate scores highest, else 1; NaN where the scores are, so that the step is skipped."""
    scores_BC = candidate_scores(model, batch)
    return (scores_BC.argmax(1) != batch["labels"]).float() + 0 * scores_BC.amax(1)


def generated_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    tokenizer: Any,
    pad_id: int,
    score: Callable[[str, str, Sequence[str]], float],
    offset: float,
    reply: bool = False,
    end: str | None = LINE,
    most: int | None = None,
    more_ends: Iterable[int] = (),
) -> Tensor:
    """(B,): offset − the score of what the model writes after each prompt; NaN where its logits were no numbers.

    reply, end, most, more_ends: see `zotune.tasks.generation.write`.
    """
    answers = write(
        model, tokenizer, batch["prompt_ids"], batch["prompt_mask"], pad_id=pad_id, reply=reply, end=end, most=most,
        more_ends=more_ends,
    )  # fmt: skip
    scored = zip(batch["prompts"], answers, batch["golds"], strict=True)
    losses = [
        offset - score(prompt, answer.text, golds) if answer.finite else math.nan for prompt, answer, golds in scored
    ]
    return torch.tensor(losses, dtype=torch.float64)


def _prompts(rows: Sequence[Encoded], *, tokenizer: Any, pad_id: int) -> dict[str, Any]:
    ids, mask = left_padded([row.asked for row in rows], pad_id)
    prompts = [tokenizer.decode(list(row.asked), skip_special_tokens=True) for row in rows]
    golds = [list(row.golds) or [_right(row, tokenizer)] for row in rows]
    return {"prompt_ids": ids, "prompt_mask": mask, "prompts": prompts, "golds": golds}


def _right(row: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(row.candidates[row.label]), skip_special_tokens=True)).strip()
