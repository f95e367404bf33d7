"""A Trainer of several processes: each has batches of its own, as transformers deals them, and a step has the rows of all."""

from __future__ import annotations

import logging

import transformers

from zotune.errors import InputError
from zotune.workers.group import Workers, join

logger = logging.getLogger(__name__)


def processes(args: transformers.TrainingArguments) -> Workers | None:
    """Those that the Trainer is one of; None where it is alone. Of several the first says what a step is."""
    if args.world_size == 1:
        return None
    workers = join(own_rows=True)
    if workers is None:
        raise InputError(
            f"{args.world_size} processes: torch.distributed has no group of them; start them by torchrun or accelerate launch"
        )
    if workers.first:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        logger.warning(
            "%d processes: a step has the rows of all, %d of each (per_device_train_batch_size is a process's)",
            workers.size,
            rows,
        )
    return workers
