"""Recorded steps, applied again: what a replay and a resumed run do instead of evaluating losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zotune.directions import Displacement, joined
from zotune.record.steps import StepRecord
from zotune.record.trajectory import Record
from zotune.updates import Linear

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer


def apply_record(of: ZeroOrderOptimizer, record: Record) -> None:
    """What `ZeroOrderOptimizer.apply_record` does."""
    _refuse_rows(of)
    if any(g.get("first_order") for g in of.param_groups):
        raise ValueError("a step by back-propagation is no list of scalars: it cannot be replayed")
    of.land()
    of.settle()
    late: list[tuple[Any, StepRecord]] = []
    blocks = recorded(of, record)
    of.prepare()
    for engine, taken in zip(of.blocks, blocks, strict=True):
        if not taken.skipped:
            late.append((engine, taken))
        if of.enhancements.block_update != "jacobi":
            of.apply_now(late)
    of.apply_now(late)
    of.fold_at(record.step)
    for group in of.param_groups:
        group["step"] += 1


def _refuse_rows(of: ZeroOrderOptimizer) -> None:
    if of.method.needs_rows:
        raise ValueError(
            "a step of this method is a function of its rows too: seeds and scalars alone cannot give it again"
        )


def apply_records(of: ZeroOrderOptimizer, records: Sequence[Record]) -> None:
    """What `ZeroOrderOptimizer.apply_records` does."""
    _refuse_rows(of)
    rule, plain = of.method.rule, not of.enhancements.sequential and len(of.blocks) == 1 and not of.method.subspace
    plain = plain and not any(any(record.decay) for record in records)
    together = isinstance(rule, Linear) and not (rule.anchor or rule.memory)
    if not plain or not isinstance(rule, Linear) or not together or rule.rounding != "nearest" or of.method.first_order:
        for record in records:
            of.apply_record(record)
            if record.folded:
                of.flush()
        return
    of.land()
    of.settle()
    moves: list[Displacement] = []
    for record in records:
        (taken,) = recorded(of, record)
        if not taken.skipped:
            of.pending.append(rule.displacement(taken))
        if ((record.step + 1) % of.fold_every == 0 or record.folded) and of.pending:
            moves.append(joined(of.pending))
            of.pending.clear()
        for group in of.param_groups:
            group["step"] += 1
    most = max((len(by.seeds_Q) for by in moves), default=1)
    of.engine.writer.apply_each(moves, of.at_once(most, fold=of.fold_every > 1))
    of.shards.still()


def recorded(of: ZeroOrderOptimizer, record: Record) -> list[StepRecord]:
    """A recorded step as each block took it; what was not a number, or skipped, moves nothing."""
    if record.step != of.steps:
        raise ValueError(f"the record of step {record.step}: step {of.steps} comes next")
    each = len(record.g) // len(of.blocks)
    if len(of.blocks) == 1:
        of.pairs = each // of.method.queries
    found = []
    for block in range(len(of.blocks)):
        g_Q = record.g[block * each : (block + 1) * each]
        skipped = record.skipped or any(map(math.isnan, g_Q))
        seeds_Q, g_GQ = of.seeds(record.step, block), (g_Q,) * len(of.param_groups)
        found.append(StepRecord(record.step, seeds_Q, (), g_GQ, record.lr, record.decay, skipped, record.choice))
    return found
