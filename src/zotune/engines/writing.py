"""How updates reach the weights: at once, by the directions themselves. Some engines have others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement


class Writer:
    """θ ← θ + Σ c·z, rounded once; what stands beside an engine and shares its directions.

    A writer may hold an update back until the engine next reads the weights (`holds`); whoever else reads them calls `settle`
    first. at_once: of low-rank directions, how many are summed before they are rounded.
    """

    def __init__(self, directions: Directions) -> None:
        self.directions = directions

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        """θ ← θ + displacement, now."""
        self.directions.apply(by)

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        at_once: int = 1,
    ) -> None:
        """θ + r ← factor·(θ + r) + displacement, see `Directions.apply_compensated`."""
        self.directions.apply_compensated(by, residuals, factors)

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        """`apply` of one after the other, to the bit, with fewer passes over the weights."""
        self.directions.apply_each(moves)

    @property
    def holds(self) -> bool:
        """Whether `hold` leaves an update to the next read of the weights."""
        return False

    def hold(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        """`apply`, at the latest when the engine next reads the weights, or by `settle`."""
        self.apply(by, at_once)

    def settle(self) -> None:
        """Apply what `hold` left."""

    def ready(self) -> None:
        """Before a forward of the engine's own that needs all weights current."""
        self.settle()

    def arm(self, count: int) -> None:
        """Before a captured step, which takes what `hold` left of `count` directions from where it is on the device."""

    def drop(self) -> None:
        """Give up what `hold` or `arm` left."""


class Through:
    """Directions whose displacements are applied by a writer, so that a rule need not know which."""

    def __init__(self, writer: Writer, at_once: int, hold: bool = False) -> None:
        self.writer, self.at_once, self.hold = writer, at_once, hold
        self.params, self.slots = writer.directions.params, writer.directions.slots

    def apply(self, by: Displacement | HeldDisplacement) -> None:
        (self.writer.hold if self.hold else self.writer.apply)(by, self.at_once)

    def apply_compensated(
        self, by: Displacement | HeldDisplacement, residuals: Sequence[Tensor], factors: Sequence[float | Tensor] = ()
    ) -> None:
        self.writer.apply_compensated(by, residuals, factors, self.at_once)
