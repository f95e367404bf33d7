"""What a run is expected to take, told before it and again beside what it took."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

from zotune.estimates.memory import readable
from zotune.prepare.prepared import LENGTHS, Prepared


@dataclass(frozen=True)
class Expected:
    """Of a run: bytes at the peak of a step, and seconds from first to last. 0: not known."""

    peak_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{readable(self.peak_bytes)} at the peak, about {time_of(self.seconds)}"


def time_of(seconds: float) -> str:
    """
    >>> time_of(2.14), time_of(264.0), time_of(9000.0), time_of(864000.0)
    ('2.1 s', '4.4 minutes', '2.5 hours', '10.0 days')
    """
    for unit, length, least in (("days", 86400, 172800), ("hours", 3600, 7200), ("minutes", 60, 60)):
        if seconds >= least:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def expected(ready: Prepared) -> Expected:
    """By `zotune.estimates.estimate`: a step of the longest rows for memory, of usual ones for time, and the rows that are scored.

    Nothing for what that does not know: blocks, hybrid training, kept masks, quantised weights, several directions, masked
    models, classifiers, answers that are generated, losses without a gradient.
    """
    from zotune.estimates.estimate import (
        METHODS,
        PROCESS_BYTES,
        SCHEMES,
        counted,
        estimate,
        forward_seconds,
        rates_here,
    )
    from zotune.models.kinds import kind_of

    config = ready.config
    known = config.method in METHODS and config.scheme in SCHEMES and kind_of(ready.model) == "causal"
    known = known and config.loss in ("answer", "candidates") and not ready.task.generates
    if not known or not counted(config.model_dump(include={"blocks", "hybrid", "mask", "quantize", "groups"})):
        return Expected()
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
        "masked": bool(config.sparsity), "engine": config.engine,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = copy.deepcopy(getattr(ready.model, "config"))  # noqa: B009
            largest = estimate(base, seq_len=_padded(max(lengths), on_cpu), **common)
            step = estimate(base, seq_len=_padded(round(sum(usual) / len(usual)), on_cpu), **common)
    except Exception:  # an estimate is no reason for a run to fail
        return Expected()
    evaluations = -(-config.steps // config.evaluates_every)
    scored = 2 * len(ready.test) + evaluations * len(ready.validation)
    seconds = config.steps * config.accumulate * (step.step_seconds or 0.0)
    seconds += scored / sequences * forward_seconds(step, rates)
    return Expected(largest.peak + PROCESS_BYTES * on_cpu, seconds)


def _padded(tokens: int, on_cpu: bool) -> int:
    return tokens if on_cpu else -(-tokens // LENGTHS) * LENGTHS
