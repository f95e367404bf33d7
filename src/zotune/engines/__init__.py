"""How the loss at displaced weights is obtained. An engine knows no method and no task.

An engine is built over `Directions` and has `loss(closure, at)`, `both(loss, batch, at)`, `apply(by)` and the count `forwards`.
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


def make_engine(name: str, directions: Directions, groups: int | str = 1, rank: int = 1) -> SequentialEngine:
    """The named engine; `auto` takes the fastest that draws the directions as the method has them.

    That is `lowrank` where the rows of a batch are to have directions of their own, else `dual` on CUDA and `sequential` on
    the CPU, where dual is no faster and needs more memory (docs/performance.md). Unknown names, and groups with another
    engine, raise ValueError.
    """
    if name not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {name!r}; {nearest(name, ['auto', *ENGINES])}")
    if name == "lowrank" or (name == "auto" and groups != 1):
        from zotune.engines.lowrank import LowRankEngine

        return LowRankEngine(directions, rank)
    if groups != 1:
        raise ValueError(
            f"groups={groups!r}: engine {name!r} gives a batch one direction; use engine='lowrank' or 'auto'"
        )
    if name == "sequential" or (name == "auto" and not all(p.is_cuda for p in directions.params)):
        from zotune.engines.sequential import SequentialEngine

        return SequentialEngine(directions)
    from zotune.engines.dual import DualEngine

    return DualEngine(directions, may_hold=name == "dual")  # with `auto` weights are current after each step
