"""The mean of the losses that a Trainer logs, without those of steps that were skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Tally:
    """Counts steps and, where losses are computed, the finite ones: the Trainer divides by all steps, and adds NaN for good."""

    def __init__(self) -> None:
        self._steps = self._steps_before = 0
        self._finite: Tensor | None = None
        self._finite_before = 0

    def add(self, loss: Tensor) -> Tensor:
        """The loss, 0 where it is not finite. Waits for nothing."""
        finite = (loss - loss) == 0  # half the kernels of isfinite
        self._steps += 1
        self._finite = finite.long() if self._finite is None else self._finite.add_(finite)
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def mean(self, mean: float) -> float | None:
        """Of the steps since the last call. mean: over all of them, skipped ones as 0. None: all were skipped."""
        steps, finite = self._steps, 0 if self._finite is None else int(self._finite)
        self._steps, self._finite = 0, None
        self._steps_before += steps
        self._finite_before += finite
        return _rescaled(mean, steps, finite)

    def mean_of_all(self, mean: float) -> float | None:
        """The same of all steps that were added."""
        finite = self._finite_before + (0 if self._finite is None else int(self._finite))
        return _rescaled(mean, self._steps_before + self._steps, finite)


def _rescaled(mean: float, steps: int, finite: int) -> float | None:
    if finite == steps:
        return mean
    return mean * steps / finite if finite else None


def without_nan(logs: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: None for what is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
