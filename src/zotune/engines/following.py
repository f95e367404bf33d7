"""What the engines that evaluate many places in one forward share: the repeated batch, its cuts, trust, and the way out."""

# C copies of a batch, B its rows, P parts of a forward.

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.modules import FusedModules
from zotune.engines.parts import PartedReads, Parts, Unfollowed, kernels_for
from zotune.engines.places import Places, repeated, rows_in, tokens_in
from zotune.engines.reads import same_draws
from zotune.engines.sequential import SequentialEngine

logger = logging.getLogger(__name__)

ROUNDED = (
    16  # of a format's last places, and of a loss of 1 more: what rounding alone may put a first batch's losses off
)
FARTHEST = 1e4  # times a displacement, to look again


class _Off(NamedTuple):
    """Of a first batch's losses, means in nats: how far they are off, their size, how far a row's are apart.

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
    """The losses of all places of a step from as few forwards as `forward_tokens` allows, where the model allows it.

    The first batch is also computed by `sequential`, and the losses of its first two copies compared: a model that mixes rows, or
    hides them from the first dimension, is found out before it trains on wrong numbers. Then, and where the forward cannot be
    followed or draws (dropout, which all places must share), `sequential` does the work, and a line says so once: a warning where
    the engine was asked for, and on CUDA.

    forward_tokens: of one forward, at most; None: what suits the device (`most_tokens`), and no pair of places is split for it.
    """

    def __init__(self, directions: Directions, asked: bool = True, forward_tokens: int | None = None) -> None:
        super().__init__(directions)
        self.asked = asked
        self.forward_tokens = forward_tokens
        self.usable = True
        self.why = ""  # it is not
        self.trust: bool | None = None  # what a process before this one found, so that a resumed run takes the same way
        self._checked = False
        self._fused = FusedModules(directions.params)
        self._eps = 0.0  # of the narrowest format that activations were seen in
        self._layouts: dict[Any, tuple[int, Parts]] = {}

    @property
    def moving(self) -> Sequence[torch.nn.Parameter]:
        """The parameters that places displace."""
        return self.directions.params

    def _all_read(self, mode: PartedReads) -> None:
        if len(mode.seen) < len(self.moving):
            unread = next(p for p in self.moving if id(p) not in mode.seen)
            raise Unfollowed(f"{self.directions.slots[id(unread)].name} is read by no torch function")

    @abstractmethod
    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        """The mode under which a batch of these parts is computed, each at its direction of the displacement."""

    def losses(self, loss: Callable[[Any], Any], batch: Any, places: Places) -> Tensor:
        if self.trust is False and self.usable:
            self._step_aside("it stepped aside before the run was resumed")
        if not self.usable or not isinstance(batch, Mapping) or not self._worth(batch):
            return self._apart(loss, batch, places)
        redraw = same_draws(self.directions.params)
        try:
            found = self._together(loss, batch, places)
            if redraw.needed():
                raise Unfollowed("the loss draws from torch's generator (dropout?)")
            if not self._checked and not capturing():
                if self._fused:  # the forward that is checked is the one that is used
                    found = self._together(loss, batch, places)
                    self.forwards -= len(places.copies)
                if self.trust is None:
                    self._check(found[:2], loss, batch, places.some(0, 2))
                self._checked = self.trust = True
        except Exception as error:
            # A loss that was written for its own batch may raise anything at a repeated one; later it raises of itself.
            expected = isinstance(error, (Unfollowed, RuntimeError, IndexError)) or not self._checked
            if not expected or isinstance(error, torch.OutOfMemoryError) or capturing():
                raise
            redraw()
            found = self._apart(loss, batch, places)  # where the batch is at fault, this raises
            self._give_up((str(error).splitlines() or [type(error).__name__])[0])
        return found

    def _worth(self, batch: Mapping[str, Any]) -> bool:
        """Whether one forward over several copies of the batch is the way to be preferred."""
        return True

    def _together(self, loss: Callable[[Any], Any], batch: Mapping[str, Any], places: Places) -> Tensor:
        """(C, B): each row's loss at each of its places."""
        rows, copies = rows_in(batch), len(places.copies)
        if not rows:
            raise Unfollowed("the batch holds no tensor")
        cuts = list(self._cuts(batch, rows, places))
        found = [self._forward(loss, batch, places, rows, first, last) for first, last in cuts]
        self.forwards += copies
        return (found[0] if len(found) == 1 else torch.cat(found)).view(copies, rows)

    def _cuts(self, batch: Mapping[str, Any], rows: int, places: Places) -> Iterator[tuple[int, int]]:
        """The rows of all copies, one after the other, cut into forwards of one size; into whole copies, if these are no more."""
        copies, limit = len(places.copies), self.forward_tokens
        if limit is None:
            limit = max(most_tokens(self.directions.params[0].device), 2 * tokens_in(batch))
        each = rows_together(rows, copies, tokens_in(batch), limit)
        for first in range(0, copies * rows, each):
            yield first, min(first + each, copies * rows)

    def _forward(
        self, loss: Callable[[Any], Any], batch: Mapping[str, Any], places: Places, rows: int, first: int, last: int
    ) -> Tensor:
        """(last − first,): the losses of some rows of the copies by one forward."""
        try:
            some = repeated(batch, first, last)
        except ValueError as error:
            raise Unfollowed(str(error)) from None
        direction, parts = self._layout(places, rows, first, last)
        at = places.at.some(direction, direction + parts.directions)
        with torch.no_grad(), self._reads(at, parts) as mode:
            mode.watching = not self._checked
            known = self._checked or self._fused or kernels_for(self.directions.params[0]) is None
            learning = nullcontext() if known else self._fused.learning()
            with learning, self._fused.standing_in(mode):
                losses = loss(some)
        self._eps = max(self._eps, mode.eps)
        if not isinstance(losses, Tensor) or losses.numel() != last - first:
            raise Unfollowed("the loss is one number for all rows; return one a row")
        self._all_read(mode)
        return losses.detach().view(-1)

    def _layout(self, places: Places, rows: int, first: int, last: int) -> tuple[int, Parts]:
        """Some rows of the copies as parts, and the first direction that these take: theirs are counted from it."""
        key = (places.copies, places.shares, rows, first, last)
        if key not in self._layouts:
            found, start = [], 0
            for place in places.of(rows):
                size = place.last - place.first
                inside = min(start + size, last) - max(start, first)
                if inside > 0:
                    found.append((inside, place.direction, place.sign, place.first))
                start += size
            lowest = min((direction for _, direction, sign, _ in found if sign), default=0)
            directions = [direction - lowest if sign else 0 for _, direction, sign, _ in found]
            sizes, _, signs, firsts = zip(*found, strict=True)
            parts = Parts(sizes, directions, signs, firsts)
            self._layouts[key] = lowest, parts
        return self._layouts[key]

    def _check(self, found: Tensor, loss: Any, batch: Any, places: Places) -> None:
        """Raise Unfollowed where these losses of a first batch are not those of separate forwards.

        A small displacement may change losses less than a narrow format rounds them. Where that may be all that they are off,
        they are looked at once more, so far away that rounding is small beside what they change: the error of a wrong
        forward grows with that.
        """
        counted = self.forwards
        try:
            off = self._off(found, loss, batch, places)
            if off.much and off.error <= ROUNDED * self._eps * (1 + off.size):
                far = places.times(min(2 * off.error / (off.share * off.spread + 1e-300), FARTHEST))
                further = self._off(self._together(loss, batch, far), loss, batch, far)
                off = off if further.much or not math.isfinite(further.error) else further
            if off.much:
                raise Unfollowed(f"its losses are {off.error:.2g} off those of separate forwards")
        finally:
            self.forwards = counted

    def _off(self, found: Tensor, loss: Any, batch: Any, places: Places) -> _Off:
        ours, theirs = found.double(), self._apart(loss, batch, places).double()
        # what the shape of a batch alone changes: the same losses at θ, repeated and not
        again = repeated(batch, 0, ours.numel())
        with torch.no_grad():
            once, twice = (loss(b).detach().double().view(-1) for b in (batch, again))
        size = float(theirs.abs().mean())
        shape = (twice.view(len(ours), -1) - once).abs().nan_to_num(0, 0, 0)  # losses may be finite beside θ alone
        rounding = 10 * float(shape.max()) + 4 * self._eps * size
        # narrow activations carry their own error at each displacement: 0.04 to 0.08 of the spread in bfloat16 (LLaMA-7B)
        share, spread = 0.05 + 16 * self._eps, float((theirs[0] - theirs[-1]).abs().mean())
        return _Off(float((ours - theirs).abs().mean()), size, spread, share, rounding)

    def _step_aside(self, why: str) -> None:
        self.usable, self.why, self.trust = False, why, False

    def _give_up(self, why: str) -> None:
        self._step_aside(why)
        # on a CPU, who named nothing loses little and has nothing to change; on CUDA steps take longer than was said
        told = self.asked or self.directions.params[0].is_cuda
        level = logging.WARNING if told else logging.INFO
        logger.log(level, "engine %s: %s; steps go on by separate forwards", self.name, why)


# Numbers of a batch, tokens mostly, up to which one forward of two copies is worth it on a CPU. It saves a draw of each weight,
# whatever the batch; a repeated batch's activations leave the caches and are allocated anew, which grows with it
# (docs/performance.md).
WORTH_ON_CPU = 512
TOKENS_A_GIB = 256  # of a card's memory: 32,768 for 139 GiB, 4,096 for 24


def most_tokens(device: torch.device) -> int:
    """Tokens of a forward over several places, where nothing else is said: by memory on CUDA, by speed on a CPU.

    The same for all cards of one size, whatever else they hold at the moment, so that a run takes the same cuts again.
    """
    if device.type != "cuda":
        return 2 * WORTH_ON_CPU
    return most_tokens_of(torch.cuda.get_device_properties(device).total_memory)


def most_tokens_of(memory: int) -> int:
    """`most_tokens` of a card with so many bytes.

    >>> most_tokens_of(24 << 30), most_tokens_of(80 << 30)
    (4096, 16384)
    """
    return int(2 ** math.floor(math.log2(max(memory / 2**30, 4) * TOKENS_A_GIB)))


def rows_together(rows: int, copies: int, tokens: int, limit: int) -> int:
    """How many rows of a batch's copies one forward has: all forwards of a size, of whole copies where that makes no more of them.

    tokens: of the batch. limit: tokens of a forward.

    >>> rows_together(4, 3, 48, 144), rows_together(4, 3, 48, 72), rows_together(4, 3, 48, 100)
    (12, 6, 8)
    """
    most = max(1, limit * rows // max(1, tokens))
    forwards = -(-copies * rows // most)
    each = -(-copies // forwards) * rows
    return each if each <= most else -(-copies * rows // forwards)


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
