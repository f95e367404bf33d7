"""A step's numbers as a run records them: rounded to float32 before use, so that a replay uses the same. Loads no torch."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def float32(x: float) -> float:
    """x rounded to the nearest float32, ties to even; beyond its range an infinity."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", float(x)))[0]
        return rounded
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def coefficient(lr: float, g: float, weight: float) -> float:
    """c = −lr·g·weight, what a pair's direction is multiplied with.

    lr and g are rounded to float32, their product is exact in float64, that times weight is rounded to float64, then to
    float32. Training and replay both call this, so that they agree bit for bit. weight: the pair's part of the
    batch, float64, 1/P for P equal pairs. NaN and infinities pass through.

    >>> coefficient(1e-5, 2.0, 1 / 2)
    -9.999999747378752e-06
    """
    return float32(-(float32(lr) * float32(g)) * weight)


def shrinkage(lr: float, decay: float) -> float:
    """1 − lr·decay, what decoupled decay multiplies the weights with: lr and decay in float32, the rest in float64.

    >>> shrinkage(0.5, 0.25)
    0.875
    """
    return 1 - float32(lr) * float32(decay)


def total(x: Tensor, dim: int = 0) -> Tensor:
    """Σ x along a dimension, by halves: in one order on every device, where torch's own sum has another on CUDA than on a CPU.

    A captured step sums on the card what a step by the host, the first after a resume among them, sums on the CPU.
    """
    x = x.movedim(dim, 0)
    while len(x) > 1:
        half = len(x) // 2
        halves = x[:half] + x[half : 2 * half]
        if len(x) % 2:
            halves[:1] += x[-1:]
        x = halves
    return x[0]


def mean(x: Tensor, dim: int = 0) -> Tensor:
    """`total`, times 1/n: CUDA takes a division by a number for that too."""
    return total(x, dim) * (1 / x.shape[dim])


def spread(x: Tensor, dim: int = 0) -> Tensor:
    """√mean((x − mean x)²) along a dimension, of which 1 element is left: the standard deviation, biased."""
    off = x - mean(x, dim).unsqueeze(dim)
    return mean(off * off, dim).unsqueeze(dim).sqrt()
