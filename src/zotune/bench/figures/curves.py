"""Training loss against forward passes."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.lines import lines

NAME, TITLE = "curves", "Loss curves"
ABOUT = "Training loss, means of 40 stretches and over seeds; the band is from the least to the greatest."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    return lines(runs, groups, "loss", bins=40)
