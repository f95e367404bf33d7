"""What a run is expected to take, told before it and again beside what it took."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from typing import Any

from zotune.estimates.memory import readable
from zotune.estimates.words import time_of
from zotune.prepare.prepared import LENGTHS, Prepared

BUSY = 0.75  # of the cores: load of others from which a time says little


def load_of_others() -> float:
    """Processes that ran or waited in the last minute, 0.0 where the system does not tell; to be asked before this one works."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def busy(device_type: str, load: float) -> str:
    """What to say beside a time where others' load leaves too little of the cores; else "". On a GPU cores matter little."""
    cores = os.cpu_count() or 1
    return (
        f"the machine is busy (load {load:.1f} on {cores} cores)"
        if device_type == "cpu" and load > BUSY * cores
        else ""
    )


@dataclass(frozen=True)
class Expected:
    """Of a run: bytes at the peak of a step, seconds from first to last, and of a step on one batch. 0: not known, and why."""

    peak_bytes: int = 0
    seconds: float = 0.0
    why: str = ""
    step_seconds: float = 0.0

    def __str__(self) -> str:
        if not self.peak_bytes:
            return f"not known ({self.why})"
        return f"{readable(self.peak_bytes)} at the peak, about {time_of(self.seconds)}"


def expected(ready: Prepared) -> Expected:
    """By `zotune.estimates.estimate`: a step of the longest rows for memory, of usual ones for time, and the rows that are scored.

    What that does not know has a reason instead: blocks, hybrid training, kept masks, quantised weights,
    masked models, classifiers, answers that are generated, losses without a gradient.
    """
    from zotune.estimates.estimate import PROCESS_BYTES, estimate, uncounted
    from zotune.estimates.rates import forward_seconds, rates_here
    from zotune.models.kinds import kind_of

    config = ready.config
    why = uncounted(config.model_dump(include={"blocks", "hybrid", "mask", "quantize"}))
    if (kind := kind_of(ready.model)) != "causal":
        why = f"no estimate of {kind} models"
    elif config.loss not in ("answer", "candidates") or ready.task.generates:
        why = "no estimate of generated answers" if ready.task.generates else f"no estimate of --loss {config.loss}"
    if why:
        return Expected(why=why)
    on_cpu, size = ready.device.type == "cpu", config.batch_size
    first = ready.train[0]
    several = config.loss == "candidates" and any(len(ids) > 1 for ids in first.candidates)
    sequences = size * (len(first.candidates) if several else 1)
    lengths = [row.tokens for row in ready.train]
    usual = [max(lengths[i : i + size]) for i in range(0, len(lengths), size)]  # a batch is padded to its longest row
    answer = max(row.learned for row in ready.train)
    dtype = getattr(ready.model, "dtype")  # noqa: B009
    rates = rates_here(ready.device.type).of_products(dtype, config.tf32)
    common: dict[str, Any] = {
        "method": config.method, "scheme": config.scheme, "dtype": config.dtype, "queries": config.queries,
        "batch_size": sequences, "answer_tokens": answer, "rates": rates,
        "estimator": config.estimator, "state_dtype": config.state_dtype, "rounding": config.rounding,
        "masked": bool(config.sparsity), "engine": config.engine, "forward_tokens": config.forward_tokens,
        "groups": config.groups,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = copy.deepcopy(getattr(ready.model, "config"))  # noqa: B009
            together = sequences * min(size, config.micro_batch or size) // size
            largest = estimate(base, seq_len=_padded(max(lengths), on_cpu), **(common | {"batch_size": together}))
            step = estimate(base, seq_len=_padded(round(sum(usual) / len(usual)), on_cpu), **common)
    except Exception as error:  # an estimate is no reason for a run to fail
        return Expected(why=(str(error).splitlines() or [type(error).__name__])[0])
    evaluations = -(-config.steps // config.evaluates_every)
    scored = 2 * len(ready.test) + (1 + evaluations) * len(ready.validation)
    seconds = config.steps * config.accumulate * (step.step_seconds or 0.0)
    seconds += scored / sequences * forward_seconds(step, rates)
    return Expected(largest.peak + PROCESS_BYTES * on_cpu, seconds, step_seconds=step.step_seconds or 0.0)


def _padded(tokens: int, on_cpu: bool) -> int:
    return tokens if on_cpu else -(-tokens // LENGTHS) * LENGTHS
