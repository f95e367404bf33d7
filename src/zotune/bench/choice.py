"""Which lr and eps: validation decides, test never does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from zotune.methods import has_eps
from zotune.tasks.task import LOWER_IS_BETTER

if TYPE_CHECKING:
    from zotune.bench.store import Record


def goodness(record: Record) -> float:
    """What validation says of a finished run, the more the better."""
    best = float(record.result["validation_best"])
    return -best if record.result.get("metric") in LOWER_IS_BETTER else best


def outcome(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The pairs of lr and eps that were tried, best on validation first: mean over seeds. Test is given, it decides nothing."""
    pairs: dict[tuple[float | None, ...], list[Record]] = {}
    for record in records:
        pairs.setdefault((record.options.get("lr"), record.options.get("eps")), []).append(record)
    rows = []
    for tried in pairs.values():
        lr, eps = (_value(tried, key) for key in ("lr", "eps"))
        eps = eps if has_eps(tried[0].method, recorded=True) else math.nan
        done = [record for record in tried if record.status == "done"]
        whole = len(done) == len(tried)
        rows.append(
            {
                "lr": lr,
                "eps": eps,
                "seeds": len(done),
                "failed": len(tried) - len(done),
                "validation": mean(r.result["validation_best"] for r in done) if done else math.nan,
                "test": mean(r.result["test_after"] for r in done) if done else math.nan,
                "order": (whole, mean(map(goodness, done)) if done else -math.inf, -lr),
            }
        )
    return sorted(rows, key=lambda row: row["order"], reverse=True)


def _value(tried: Sequence[Record], key: str) -> float:
    """As it was asked for, or as the run has resolved it."""
    found = (record.options.get(key, record.result.get(key)) for record in tried)
    return float(next((value for value in found if value is not None), math.nan))
