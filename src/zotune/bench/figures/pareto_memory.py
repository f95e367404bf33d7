"""Accuracy against peak memory."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.pareto import pareto

NAME, TITLE = "pareto-memory", "Accuracy against memory"
ABOUT = "Colours are methods, shapes are schemes. The line joins the configurations that no other beats in both."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    return pareto(groups, "peak_bytes", 2**30, "peak memory (GiB)")
