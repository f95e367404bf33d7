"""What a step costs in forward passes: evaluations of the loss on one batch."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from zotune.errors import InputError

if TYPE_CHECKING:
    from zotune.estimates.needs import Needs

# Where a suite does not say: the defaults of `zotune train`.
CALIBRATION_ROWS, TRAIN_SIZE, BATCH_SIZE = 128, 1000, 16


def forwards_a_step(options: Mapping[str, Any]) -> int:
    """Forward passes of one update, accumulated batches included.

    As the method counts them (`Method.forwards`), once a block, and one more with hybrid training: what
    `ZeroOrderOptimizer.forwards_a_step` is. `blocks` is the number of blocks, or their kind, which are then counted in the
    config of the model: a name, or `{random: config}`. Source: arXiv 2402.11592, sections 3 and 5.

    >>> forwards_a_step({"method": "zo-sgd"}), forwards_a_step({"method": "zo-sgd-cons", "queries": 2})
    (2, 7)
    >>> forwards_a_step({"method": "zo-sgd", "estimator": "one-sided", "queries": 3, "accumulate": 2})
    8
    """
    step = _needs(options).forwards * _blocks(options) + (options.get("hybrid") is not None)
    return step * int(options.get("accumulate") or 1)


def _needs(options: Mapping[str, Any]) -> Needs:
    from zotune.estimates.needs import needs_of

    queries = int(options["queries"]) if options.get("queries") else None
    return needs_of(str(options.get("method", "zo-sgd")), queries, options.get("estimator"))


def _blocks(options: Mapping[str, Any]) -> int:
    blocks = options.get("blocks") or 1
    if str(blocks).isdecimal():
        return int(blocks)
    return _blocks_of(
        json.dumps(options.get("model"), allow_nan=False), str(options.get("scheme") or "full"), str(blocks)
    )


@cache
def _blocks_of(model: str, scheme: str, kind: str) -> int:
    """model: as JSON, a name or `{random: config}`."""
    import torch

    from zotune.estimates.meta import build, model_config, with_scheme
    from zotune.step.blocks import partition

    made, _ = with_scheme(build(model_config(json.loads(model)), torch.float32), scheme)
    try:
        return len(partition([name for name, p in made.named_parameters() if p.requires_grad], kind))
    except ValueError as error:
        raise InputError(f"--blocks: {error}") from None


def forwards_of(steps: int, options: Mapping[str, Any]) -> int:
    """Forward passes of so many updates, and of the rows that masks of Wanda are made from.

    >>> forwards_of(1000, {"mask": "wanda", "mask_refresh": 500, "calibration_rows": 128, "batch_size": 16})
    2016
    """
    masks = 0
    if options.get("mask") == "wanda":
        masks = -(-steps // int(options.get("mask_refresh") or max(steps, 1)))
    rows = min(int(options.get("calibration_rows") or CALIBRATION_ROWS), int(options.get("train_size") or TRAIN_SIZE))
    once = _needs(options).once if steps else 0
    return steps * forwards_a_step(options) + once + masks * -(-rows // int(options.get("batch_size") or BATCH_SIZE))


def steps_for(forward_passes: int, options: Mapping[str, Any]) -> int:
    """The updates that so many forward passes pay for, rounded down.

    >>> steps_for(40_000, {"method": "zo-sgd"}), steps_for(40_000, {"method": "zo-sgd-cons"})
    (20000, 8000)
    """
    steps = range(forward_passes // forwards_a_step(options) + 1)
    return bisect_right(steps, forward_passes, key=lambda count: forwards_of(count, options)) - 1
