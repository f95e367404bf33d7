"""How the loss at displaced weights is obtained. An engine knows no method and no task.

An engine is built over `Directions` and has `loss(closure, at)`, `both(loss, batch, at)`, the count `forwards`, and ways to move
the weights: `apply(by)`, `apply_compensated`, `apply_each`. One that may leave an update to its next read of the weights also has
`holds`, `hold`, `settle`, `arm` and `drop`, of which `SequentialEngine` says what they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.errors import nearest

if TYPE_CHECKING:
    from zotune.directions import Directions
    from zotune.engines.sequential import SequentialEngine

ENGINES = {
    "sequential": "two forwards over perturbed copies in reused scratch; any module, any closure",
    "dual": "one forward over the doubled batch, each weight read once for both of its copies",
    "lowrank": "low-rank directions beside one shared product, a direction per row if asked for (--groups batch)",
}


def choose(groups: int | str = 1) -> tuple[str, str]:
    """What `auto` takes, and why: the fastest that draws the directions as the method has them (docs/performance.md).

    >>> choose(groups=1)
    ('dual', 'one forward gives both losses of a batch; on a CPU of up to 512 tokens')
    """
    if groups != 1:
        return "lowrank", "it gives rows directions of their own"
    return "dual", "one forward gives both losses of a batch; on a CPU of up to 512 tokens"


def make_engine(name: str, directions: Directions, groups: int | str = 1, rank: int = 1) -> SequentialEngine:
    """The named engine, or the one that `choose` takes for `auto`. Unknown names, and groups with another engine, raise
    ValueError.
    """
    if name not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {name!r}; {nearest(name, ['auto', *ENGINES])}")
    asked = name
    if asked == "auto":
        name, _ = choose(groups)
    if name == "lowrank":
        from zotune.engines.lowrank import LowRankEngine

        return LowRankEngine(directions, rank)
    if groups != 1:
        raise ValueError(
            f"groups={groups!r}: engine {name!r} gives a batch one direction; use engine='lowrank' or 'auto'"
        )
    if name == "sequential":
        from zotune.engines.sequential import SequentialEngine

        return SequentialEngine(directions)
    from zotune.engines.dual import DualEngine

    return DualEngine(directions, asked=asked == "dual")  # with `auto` weights are current after each step
