"""Update rules: projected gradients → what becomes of the weights.

A rule that is linear in the directions (`Linear`) is a list of coefficients. The others read ĝ element by element (`Rule`). One of
your own is a subclass: of `Linear` with `coefficients`, or of `Rule` with `move` and `reach`; it trains, resumes and replays like
these, and is part of a captured step where it is linear.
"""

from zotune.updates.cores import Average, Orthogonalised
from zotune.updates.elementwise import Adam, Momentum, Sign
from zotune.updates.linear import (
    Conservative,
    Linear,
    MeanSquare,
    Normalised,
    RowNormalised,
    ScalarSign,
    Sgd,
    Standardised,
)
from zotune.updates.rule import ROUNDINGS, STATE_DTYPES, Rule

__all__ = [
    "ROUNDINGS",
    "STATE_DTYPES",
    "Adam",
    "Average",
    "Conservative",
    "Linear",
    "MeanSquare",
    "Momentum",
    "Normalised",
    "Orthogonalised",
    "RowNormalised",
    "Rule",
    "ScalarSign",
    "Sgd",
    "Sign",
    "Standardised",
]
