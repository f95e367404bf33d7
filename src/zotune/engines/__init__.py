"""The loss at places: how it is obtained. An engine knows no method, no estimator and no task.

`Engine` says what one does; `zotune.engines.places` what a place is; `zotune.engines.writing` how updates reach the weights, which
is the work of a writer beside the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from zotune.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from zotune.directions import Directions, Displacement, HeldDisplacement
    from zotune.directions.subspaces import Subspace
    from zotune.engines.places import Places
    from zotune.engines.scratch import Scratch
    from zotune.engines.sequential import SequentialEngine
    from zotune.engines.writing import Writer

ENGINES = {
    "sequential": "a forward a place, over perturbed copies in reused scratch; any module, any closure",
    "dual": "all places of a step in one forward over copies of the batch, each weight read once for both signs of a direction",
    "lowrank": "low-rank directions beside one shared product, any number of them for each row (--groups batch --queries N)",
}


class Engine(Protocol):
    """The losses of any places, of any closure.

    directions: the parameters that are displaced, and how z is drawn. writer: how updates reach them. scratch: memory for copies.
    forwards: evaluations of the loss on one batch so far, however many places shared a forward.
    """

    name: str
    directions: Directions
    writer: Writer
    scratch: Scratch
    forwards: int

    def losses(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        """(C, B): what loss(batch) is for each row of each copy of the batch, at its place; (C, 1) where it is one number for all.

        In the loss's own dtype and on its device, detached; weights are as they were, whether or not the loss raises. Dropout
        and other draws from torch's generators are the same in all copies. batch: what the loss takes; where it is a dict of
        tensors whose first dimension counts rows, copies may share a forward. Raises TypeError or ValueError for what is no loss.
        """
        ...

    def overlook(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> None:
        """Take from a batch that somebody else evaluates at its places what the update needs of it."""
        ...

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        """What the closure returns at θ + displacement, as it returns it."""
        ...

    def replayed(self) -> None:
        """A captured step was replayed: what it wrote into buffers is not what the host left there."""
        ...


def choose(groups: int | str = 1, low_rank: bool = False) -> tuple[str, str]:
    """What `auto` takes, and why: the fastest that draws the directions as the method has them (docs/performance.md).

    >>> choose(groups=1)
    ('dual', 'one forward gives all losses of a batch; on a CPU of up to 512 tokens')
    """
    if groups != 1:
        return "lowrank", "it gives rows directions of their own"
    if low_rank:
        return "lowrank", "the method's directions are low-rank"
    return "dual", "one forward gives all losses of a batch; on a CPU of up to 512 tokens"


def make_engine(
    name: str,
    directions: Directions,
    groups: int | str = 1,
    rank: int = 1,
    forward_tokens: int | None = None,
    kind: Subspace | Literal["own-inputs", "tracked-inputs", "flipout"] | None = None,
) -> SequentialEngine:
    """The named engine, or the one that `choose` takes for `auto`. forward_tokens: see `FollowingEngine`.

    kind: of directions that `lowrank` alone evaluates, which `auto` takes then: in a subspace, made of the maps' inputs, or
    of signs of the rows about one draw.
    Unknown names, and groups with another engine, raise ValueError.
    """
    if name not in ("auto", *ENGINES):
        raise ValueError(f"unknown engine {name!r}; {nearest(name, ['auto', *ENGINES])}")
    asked = name
    if asked == "auto":
        name, _ = choose(groups, kind is not None)
    if name == "lowrank":
        return _low_rank(directions, rank, forward_tokens, kind)
    if groups != 1:
        raise ValueError(
            f"groups={groups!r}: engine {name!r} gives a batch one direction; use engine='lowrank' or 'auto'"
        )
    if name == "sequential":
        from zotune.engines.sequential import SequentialEngine

        return SequentialEngine(directions)
    from zotune.engines.dual import DualEngine

    return DualEngine(directions, asked == "dual", forward_tokens)  # with `auto` weights are current after each step


def _low_rank(directions: Directions, rank: int, forward_tokens: int | None, kind: Any) -> SequentialEngine:
    if kind is None:
        from zotune.engines.lowrank import LowRankEngine

        return LowRankEngine(directions, rank, forward_tokens)
    if kind == "own-inputs":
        from zotune.engines.own_inputs import OwnInputsEngine

        return OwnInputsEngine(directions, forward_tokens)
    if kind == "tracked-inputs":
        from zotune.engines.tracked import TrackedEngine

        return TrackedEngine(directions, forward_tokens)
    if kind == "flipout":
        from zotune.engines.flipout import FlipoutEngine

        return FlipoutEngine(directions, forward_tokens)
    from zotune.engines.subspace import SubspaceEngine

    return SubspaceEngine(directions, kind, rank, forward_tokens)
