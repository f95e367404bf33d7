"""Accuracy against the time of a run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.pareto import pareto

NAME, TITLE = "pareto-time", "Accuracy against time"
ABOUT = "Colours are methods, shapes are schemes. Time of a run, median over seeds. The line joins what nothing beats in both."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    return pareto(groups, "seconds", 60, "minutes a run")
