"""What a step takes, tried: steps at lr 0, which leave every weight as it is."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from zotune.prepare.listener import Listener
from zotune.prepare.prepared import Prepared
from zotune.run.arguments import optimizer_for
from zotune.tasks.objectives import generates, objective

ENOUGH = 5.0  # seconds of timed steps
FEW = 4  # rows whose answers are timed


def timed(ready: Prepared, reckoned: float = 0.0) -> tuple[float, float, int, str]:
    """Seconds a step, seconds a scored row, forwards a step, and the engine: the quickest of up to three steps, some scored rows.

    A step of one row goes before, so that what a process pays once, such as compiling, is no step's. Where a step writes answers it
    is reckoned from those of a few rows: one alone may take minutes. So may one of many directions: where it is `reckoned` to take
    more than the time that is enough, that is taken, and no step.
    """
    config = ready.config
    ready.model.eval()
    optimizer = optimizer_for(ready)
    rows = (ready.train * config.batch_size)[: config.batch_size]
    asked = objective(config.loss, ready.task, ready.tokenizer, ready.pad_id)
    batch, first = (_batch(ready, asked.collate(some)) for some in (rows, rows[:1]))
    loss_of = functools.partial(asked.row_loss, ready.model)
    writes = generates(config.loss)
    began = now(ready.device)
    scored = ready.validation[: FEW if writes or ready.task.generates else 2 * config.batch_size]
    ready.score(scored, Listener(), "timing")
    row_seconds = (now(ready.device) - began) / len(scored)
    if writes:
        return optimizer.forwards_a_step * len(rows) * row_seconds * config.accumulate, row_seconds, *_of(optimizer)
    if reckoned > ENOUGH:
        return reckoned * config.accumulate, row_seconds, *_of(optimizer)
    optimizer.step(loss_of, batch=first)
    took: list[float] = []
    while len(took) < 3 and sum(took) < ENOUGH:
        began = now(ready.device)
        optimizer.step(loss_of, batch=batch)
        took.append(now(ready.device) - began)
    return min(took) * config.accumulate, row_seconds, *_of(optimizer)


def _batch(ready: Prepared, collated: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(ready.device) if isinstance(v, torch.Tensor) else v for k, v in collated.items()}


def _of(optimizer: Any) -> tuple[int, str]:
    return optimizer.forwards_a_step, optimizer.chosen_engine


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
