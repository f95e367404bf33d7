"""What the engines that run one forward over many parts share: the doubled batch, trust, and the way out."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.modules import FusedModules
from zotune.engines.parts import PartedReads, Unfollowed, kernels_for
from zotune.engines.sequential import SequentialEngine, same_draws

logger = logging.getLogger(__name__)

ROUNDED = (
    16  # of a format's last places, and of a loss of 1 more: what rounding alone may put a first batch's losses off
)
FARTHEST = 1e4  # times a displacement, to look again


class _Off(NamedTuple):
    """Of a first batch's losses, means in nats: how far they are off, their size, how far a row's two are apart.

    share of what is apart, and rounding, may be off.
    """

    error: float
    size: float
    spread: float
    share: float
    rounding: float

    @property
    def much(self) -> bool:
        """Whether rounding does not explain it. Where those of separate forwards are not finite, they show nothing."""
        return math.isfinite(self.size) and not self.error <= self.share * self.spread + self.rounding


class FollowingEngine(SequentialEngine):
    """Both losses of every row from one forward over the doubled batch, where the model allows it.

    The first batch is also computed by `sequential`, and the losses compared: a model that mixes rows, or hides them from
    the first dimension, is found out before it trains on wrong numbers. Then, and where the forward cannot be followed or
    draws (dropout, which both signs must share), `sequential` does the work, and a line says so once: a warning where the
    engine was asked for, and on CUDA.
    """

    def __init__(self, directions: Directions, asked: bool = True) -> None:
        super().__init__(directions)
        self.asked = asked
        self.usable = True
        self.why = ""  # it is not
        self.trust: bool | None = None  # what a process before this one found, so that a resumed run takes the same way
        self._checked = False
        self._fused = FusedModules(directions.params)
        self._eps = 0.0  # of the narrowest format that activations were seen in

    @abstractmethod
    def _reads(self, at: Displacement | HeldDisplacement, shares: tuple[int, ...], copies: int) -> PartedReads:
        """The mode under which a batch is computed: copies 2, a doubled one, at θ ± displacement; 1, at θ + displacement.

        shares: how many of the batch's rows each direction of the displacement has.
        """

    def both(
        self,
        loss: Callable[[Any], Any],
        batch: Any,
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None = None,
    ) -> tuple[Any, Any]:
        if self.trust is False and self.usable:
            self.usable, self.why = False, "it stepped aside before the run was resumed"
        if not self.usable or not isinstance(batch, Mapping) or not self._worth(batch):
            return self._separate(loss, batch, at, shares)
        redraw = same_draws(self.directions.params)
        try:
            found = self._doubled(loss, batch, at, shares)
            if redraw.needed():
                raise Unfollowed("the loss draws from torch's generator (dropout?)")
            if not self._checked and not capturing():
                if self._fused:  # the forward that is checked is the one that is used
                    found = self._doubled(loss, batch, at, shares)
                    self.forwards -= 2
                if self.trust is None:
                    self._check(found, loss, batch, at, shares)
                self._checked = self.trust = True
        except Exception as error:
            # A loss that was written for its own batch may raise anything at a doubled one; later it raises of itself.
            expected = isinstance(error, (Unfollowed, RuntimeError, IndexError)) or not self._checked
            if not expected or isinstance(error, torch.OutOfMemoryError) or capturing():
                raise
            redraw()
            found = self._separate(loss, batch, at, shares)  # where the batch is at fault, this raises
            self._give_up((str(error).splitlines() or [type(error).__name__])[0])
        return found

    def _worth(self, batch: Mapping[str, Any]) -> bool:
        """Whether one forward over the doubled batch is the way to be preferred."""
        return True

    def _doubled(
        self,
        loss: Callable[[Any], Any],
        batch: Mapping[str, Any],
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        rows = rows_in(batch)
        doubled = twice_over(batch)
        with torch.no_grad(), self._reads(at, shares or (rows,), 2) as mode:
            mode.watching = not self._checked
            known = self._checked or self._fused or kernels_for(self.directions.params[0]) is None
            learning = nullcontext() if known else self._fused.learning()
            with learning, self._fused.standing_in(mode):
                losses = loss(doubled)
        self.forwards += 2
        self._eps = max(self._eps, mode.eps)
        if not isinstance(losses, Tensor) or losses.numel() != 2 * rows:
            raise Unfollowed("the loss is one number for all rows; return one a row")
        if len(mode.seen) < len(self.directions.params):
            unread = next(p for p in self.directions.params if id(p) not in mode.seen)
            raise Unfollowed(f"{self.directions.slots[id(unread)].name} is read by no torch function")
        plus, minus = losses.view(2, rows)
        return plus, minus

    def _check(
        self, found: tuple[Tensor, Tensor], loss: Any, batch: Any, at: Displacement | HeldDisplacement, shares: Any
    ) -> None:
        """Raise Unfollowed where these losses of a first batch are not those of separate forwards.

        A small displacement may change losses less than a narrow format rounds them. Where that may be all that they are off,
        they are looked at once more, so far away that rounding is small beside what they change: the error of a wrong
        forward grows with that.
        """
        counted = self.forwards
        try:
            off = self._off(found, loss, batch, at, shares)
            if off.much and off.error <= ROUNDED * self._eps * (1 + off.size):
                far = at.times(min(2 * off.error / (off.share * off.spread + 1e-300), FARTHEST))
                further = self._off(self._doubled(loss, batch, far, shares), loss, batch, far, shares)
                off = off if further.much or not math.isfinite(further.error) else further
            if off.much:
                raise Unfollowed(f"its losses are {off.error:.2g} off those of separate forwards")
        finally:
            self.forwards = counted

    def _off(
        self, found: tuple[Tensor, Tensor], loss: Any, batch: Any, at: Displacement | HeldDisplacement, shares: Any
    ) -> _Off:
        wanted = self._separate(loss, batch, at, shares)
        ours, theirs = (torch.stack([t.detach().double().view(-1) for t in pair]) for pair in (found, wanted))
        # what the shape of a batch alone changes: the same losses at θ, doubled and not
        doubled = twice_over(batch)
        with torch.no_grad():
            once, twice = (loss(b).detach().double().view(-1) for b in (batch, doubled))
        size = float(theirs.abs().mean())
        shape = (twice.view(2, -1) - once).abs().nan_to_num(0, 0, 0)  # losses may be finite beside θ alone
        rounding = 10 * float(shape.max()) + 4 * self._eps * size
        # narrow activations carry their own error at each displacement: 0.04 to 0.08 of the spread in bfloat16 (LLaMA-7B)
        share, spread = 0.05 + 16 * self._eps, float((theirs[0] - theirs[1]).abs().mean())
        return _Off(float((ours - theirs).abs().mean()), size, spread, share, rounding)

    def _give_up(self, why: str) -> None:
        self.usable, self.why, self.trust = False, why, False
        # on a CPU, who named nothing loses little and has nothing to change; on CUDA steps take longer than was said
        told = self.asked or self.directions.params[0].is_cuda
        level = logging.WARNING if told else logging.INFO
        logger.log(level, "engine %s: %s; steps go on by two separate forwards", self.name, why)


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def twice_over(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its rows once more behind them."""
    return {k: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t for k, t in batch.items()}


def rows_in(batch: Mapping[str, Any]) -> int:
    """Rows of a batch: the smallest first dimension of its tensors."""
    sizes = [t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.dim()]
    if not sizes:
        raise Unfollowed("the batch holds no tensor")
    return min(sizes)
