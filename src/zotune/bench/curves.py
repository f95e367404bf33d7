"""What a run had reached on its way."""

from __future__ import annotations

import math
from typing import Any

from zotune.tasks.task import LOWER_IS_BETTER


def reached(run: Any, spent: float, along: str = "forward_passes") -> float:
    """The best validation of a run by the time that it had spent so much; NaN before its first."""
    key = f"validation_{run.metric or 'accuracy'}"
    found = [m[key] for m in run.metrics if m.get(key) is not None and m.get(along, math.inf) <= spent]
    return (min if run.metric in LOWER_IS_BETTER else max)(found, default=math.nan)
