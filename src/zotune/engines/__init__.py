"""How the loss at displaced weights is obtained. An engine knows no method and no task.

An engine is built over `Directions` and has `loss(closure, at)`, `apply(by)` and the count `forwards`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.errors import nearest

if TYPE_CHECKING:
    from zotune.directions import Directions
    from zotune.engines.sequential import SequentialEngine

ENGINES = {
    "sequential": "two forwards over perturbed copies in reused scratch; any module, any closure",
}


def make_engine(name: str, directions: Directions) -> SequentialEngine:
    """The named engine; `auto` takes the fastest that is right for the parameters. Unknown names raise ValueError."""
    if name not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {name!r}; {nearest(name, ['auto', *ENGINES])}")
    from zotune.engines.sequential import SequentialEngine

    return SequentialEngine(directions)
