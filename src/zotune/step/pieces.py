"""The rows of a step in pieces that are evaluated together (`--micro-batch`), by one process or dealt out to workers.

A piece goes to the engine with all its places, so its losses are the same whoever evaluates it. Means over rows come from sums that
depend on no order: each loss is cut into a multiple of 2⁻²⁴ and one of 2⁻⁶⁶, and float64 adds up to 4,096 of either exactly
while the losses' sum is under 5·10⁸. The two sums are added, rounded, and divided by the number of rows.
"""

# C copies of a batch, B rows of the step, K directions over them, n rows of a piece.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zotune.engines import Engine
from zotune.engines.places import repeated, rows_in
from zotune.engines.reads import same_draws
from zotune.errors import WorkerError
from zotune.workers.group import EVERY
from zotune.workers.message import DONE, DREW, FAILED, PLACE_BYTES, Message, batches_sum, weights_sum

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer
    from zotune.workers.group import Workers

COARSE, FINE = 2.0**-24, 2.0**-66
Bounds = Sequence[tuple[int, int]]  # of the rows of each direction: the first, and the one behind the last
_DTYPES = {4: torch.float32, 8: torch.float64}


class Piece(NamedTuple):
    """Rows first … first + rows − 1 of the step, as a batch."""

    first: int
    rows: int
    batch: Any


def pieces(batches: Sequence[Any], most: int | None) -> Iterator[Piece]:
    """Each batch cut into so many rows and what is left, in order; None: whole. The rows of a step run on over its batches."""
    first = 0
    for batch in batches:
        rows = rows_in(batch) if isinstance(batch, Mapping) else 0
        if not rows:
            raise ValueError(
                "micro_batch: cuts a batch by its rows, so a step needs it: optimizer.step(loss, batch=batch), batch a dict of "
                "tensors whose first dimension counts rows"
            )
        each = min(most or rows, rows)
        for start in range(0, rows, each):
            end = min(start + each, rows)
            yield Piece(first + start, end - start, batch if each == rows else rows_of(batch, rows, start, end))
        first += rows


def rows_of(batch: Mapping[str, Any], rows: int, first: int, last: int) -> dict[str, Any]:
    """Some rows of a batch of so many: of its tensors, and of its lists of one entry a row."""
    try:
        found = repeated(batch, first, last)
    except ValueError as error:
        raise ValueError(f"micro_batch: {error}, so that rows cannot be told apart; leave it out") from None
    listed = (name for name, value in batch.items() if isinstance(value, (list, tuple)) and len(value) == rows)
    return found | {name: batch[name][first:last] for name in listed}


@dataclass
class Sharing:
    """How the rows of a step are evaluated: micro_batch at a time, by which workers. Of neither: batch by batch, as they come.

    in_step: whether the workers hold parts of one model, so that their weights differ and they have to run as many forwards.
    tensors: whether the last loss that was evaluated here was a tensor.
    """

    micro_batch: int | None = None
    workers: Workers | None = None
    in_step: bool = False
    tensors: bool = False

    @property
    def whole(self) -> bool:
        """Whether batches are evaluated as they come, by this process alone."""
        return self.micro_batch is None and self.workers is None

    def begin(self, of: ZeroOrderOptimizer, batches: Sequence[Any]) -> None:
        """Before a step: every so often what workers tell each other has check sums of their weights and batches."""
        workers = self.workers
        if workers is None:
            return
        if of.method.kind != "zeroth-order" or of.enhancements.hybrid is not None:
            raise ValueError(
                "workers: share the places of zeroth-order steps, and this method differentiates; run one process"
            )
        if self.micro_batch is None and not workers.own_rows:
            raise ValueError(
                "workers: share out pieces of a step's rows; give micro_batch=M, of fewer than a batch has"
            )
        if of.method.needs_rows and workers.own_rows:
            raise ValueError(
                "own_rows: an update of this method needs all rows of its step; give every worker all, join()"
            )
        if of.steps % EVERY == 0 or not workers.sent:
            of.settle()
            if not self.in_step:
                workers.weights = weights_sum(p for group in of.param_groups for p in group["params"])
            workers.batches = 0 if workers.own_rows else batches_sum(batches)

    def rows(self, batches: Sequence[Any]) -> int:
        """Of a step, over all workers."""
        own = sum(map(rows_in, batches))
        return sum(self.workers.counts(own)) if self.workers is not None and self.workers.own_rows else own

    def means(
        self,
        engine: Engine,
        batches: Sequence[Any],
        shares_K: Sequence[int],
        copies: int,
        evaluate: Callable[[Piece], Tensor],
        overlook: Callable[[Piece], None],
    ) -> Tensor:
        """(C, K) float64: the mean over the rows of each of K directions of the rows' losses at their places.

        copies: C. evaluate: a piece → (C, n), a loss a row. overlook: takes from a piece that another worker evaluates what the
        update needs of it.
        """
        if self.workers is not None and self.workers.own_rows:
            parts, owners = self._with_others(batches)
        else:
            parts = list(pieces(batches, self.micro_batch))
            owners = [i % self.workers.size for i in range(len(parts))] if self.workers is not None else []
        apart = len(shares_K) > 1 and set(shares_K) == {1}
        bounds = (
            list(pairwise(accumulate(shares_K, initial=0))) if len(shares_K) > 1 else [(0, sum(p.rows for p in parts))]
        )
        if bounds[-1][1] != parts[-1].first + parts[-1].rows:
            raise ValueError(
                f"groups: directions for {bounds[-1][1]} rows, the batches have {parts[-1].first + parts[-1].rows}"
            )
        if self.workers is not None:
            return _Dealt(self.workers, engine, parts, owners, bounds, copies).means(apart, evaluate, overlook)
        found = [_checked(evaluate(part), part) for part in parts]
        if apart:
            return torch.cat([losses_Cn.double() for losses_Cn in found], 1)
        return _mean(sum(_sums(losses_Cn, part, bounds) for losses_Cn, part in zip(found, parts, strict=True)), bounds)  # type: ignore[arg-type]

    def _with_others(self, batches: Sequence[Any]) -> tuple[list[Piece], list[int]]:
        """The pieces of a step whose rows are the workers' own, by rank, and whose each is. One of another stands for all of its.

        A batch that cannot be cut counts as one row.
        """
        assert self.workers is not None
        if self.micro_batch is None and not all(isinstance(b, Mapping) and rows_in(b) for b in batches):
            own = [Piece(i, 1, batch) for i, batch in enumerate(batches)]
        else:
            own = list(pieces(batches, self.micro_batch))
        counts = self.workers.counts(own[-1].first + own[-1].rows)
        if self.in_step and len({*counts}) > 1:
            raise ValueError(
                f"own_rows: {min(counts)} to {max(counts)} rows of a step for a process: those that hold parts of a model run each "
                "forward together; give each as many"
            )
        parts, owners, first = list[Piece](), list[int](), 0
        for rank, rows in enumerate(counts):
            theirs = own if rank == self.workers.rank else [Piece(0, rows, None)]
            parts += [piece._replace(first=first + piece.first) for piece in theirs]
            owners += [rank] * len(theirs)
            first += rows
        return parts, owners


def _checked(losses_Cn: Tensor, piece: Piece) -> Tensor:
    if losses_Cn.shape[1] != piece.rows:
        raise ValueError(
            f"micro_batch: the loss gives {losses_Cn.shape[1]} numbers for {piece.rows} rows; return one a row, in their order"
        )
    return losses_Cn


def _sums(losses_Cn: Tensor, piece: Piece, bounds: Bounds) -> Tensor:
    """(2, C, K): exact sums over a piece's rows of the coarse and the fine part of their losses, by direction."""
    losses_Cn = losses_Cn.double()
    coarse_Cn = (losses_Cn / COARSE).round() * COARSE
    fine_Cn = ((losses_Cn - coarse_Cn) / FINE).round() * FINE
    both_2Cn = torch.stack([coarse_Cn, fine_Cn])
    inside = [(max(a - piece.first, 0), max(b - piece.first, 0)) for a, b in bounds]
    return torch.stack([both_2Cn[:, :, a:b].sum(2) for a, b in inside], 2)


def _mean(sums_2CK: Tensor, bounds: Bounds) -> Tensor:
    total_CK = sums_2CK[0] + sums_2CK[1]
    # by tensors made on the device: CUDA multiplies with the reciprocal of a number, and a graph can copy none from the host
    rows_K = torch.stack([total_CK.new_full((), float(b - a)) for a, b in bounds])
    return total_CK / rows_K


class _Dealt:
    """A step's pieces, of which this worker evaluates its own. All workers get the same means, those of one process.

    An engine learns from the first piece of its life (whether one forward serves, which parameters are read), so all workers
    evaluate that one. Where it steps aside later, all do behind that piece, as one process would.
    """

    def __init__(
        self,
        workers: Workers,
        engine: Any,
        parts: Sequence[Piece],
        owners: Sequence[int],
        bounds: Bounds,
        copies: int,
    ) -> None:
        self.workers, self.engine, self.parts, self.bounds, self.copies = workers, engine, parts, bounds, copies
        self.owners, self.own = owners, [i for i, owner in enumerate(owners) if owner == workers.rank]
        self.found: dict[int, Tensor] = {}
        self.aside, self.drew, self.width = -1, False, 8

    def means(self, apart: bool, evaluate: Callable[[Piece], Tensor], overlook: Callable[[Piece], None]) -> Tensor:
        told = self._tell(apart, self._evaluate(evaluate, overlook, 0))
        aside = {one.aside for one in told}
        if len(aside) > 1:
            self.engine.trust = False  # it steps aside before the next piece
            behind = 0 if self.workers.own_rows else min(at for at in aside if at >= 0) + 1
            told = self._tell(apart, self._evaluate(evaluate, overlook, behind))
        if not apart:
            shape = (2, self.copies, len(self.bounds))
            sums = [torch.frombuffer(bytearray(one.losses), dtype=torch.float64).view(shape) for one in told]
            return _mean(torch.stack(sums).sum(0), self.bounds)
        losses_CK = torch.empty(self.copies, len(self.bounds), dtype=torch.float64)
        for rank, one in enumerate(told):
            flat = torch.frombuffer(bytearray(one.losses), dtype=_DTYPES[self.width])
            rows = self._rows(rank)
            losses_CK[:, rows] = flat[: self.copies * len(rows)].view(self.copies, -1).double()
        return losses_CK

    def _evaluate(
        self, evaluate: Callable[[Piece], Tensor], overlook: Callable[[Piece], None], behind: int
    ) -> Exception | None:
        """The losses of this worker's pieces from one on; what went wrong."""
        fresh = self.engine.forwards == 0 and not self.workers.own_rows
        redraw = same_draws(self.engine.directions.params)
        try:
            for i, piece in enumerate(self.parts[behind:], behind):
                if i not in self.own and not (fresh and i == 0):
                    if piece.batch is not None:
                        overlook(piece)
                    continue
                served = getattr(self.engine, "usable", True)
                self.found[i] = _checked(evaluate(piece), piece).cpu()
                if served and not getattr(self.engine, "usable", True):
                    self.aside = i
        except (torch.OutOfMemoryError, MemoryError) as error:
            return WorkerError(
                f"out of memory ({(str(error).splitlines() or [''])[0][:100]}); try a smaller --micro-batch"
            )
        except Exception as error:
            return error
        self.drew = redraw.needed()
        return None

    def _tell(self, apart: bool, failure: Exception | None) -> list[Message]:
        """Everybody's message, after which all know of what width losses are."""
        workers = self.workers
        width = workers.widths.get(self.engine, 8)
        most = max(len(self._rows(rank)) for rank in range(workers.size))
        size = self.copies * (width * most if apart else PLACE_BYTES * len(self.bounds))
        if failure is None and any(_width(one) > width for one in self.found.values()):
            failure = ValueError("the loss has given float32 before, and float64 now: workers cannot compare the two")
        if failure is not None:
            return workers.exchange(Message(FAILED), size, failure)
        mine = [self.found[i] for i in self.own]
        if not mine:
            data = b""
        elif apart:
            data = torch.cat([one.to(_DTYPES[width]) for one in mine], 1).contiguous().numpy().tobytes()
        else:
            sums = [_sums(one, self.parts[i], self.bounds) for i, one in zip(self.own, mine, strict=True)]
            data = torch.stack(sums).sum(0).numpy().tobytes()
        known = max(map(_width, self.found.values()), default=0)
        told = workers.exchange(Message(DREW if self.drew else DONE, width=known, aside=self.aside, losses=data), size)
        workers.widths.setdefault(self.engine, max(one.width for one in told))
        self.width = width
        return told

    def _rows(self, rank: int) -> list[int]:
        """The rows of the step that a worker evaluates, in the order of its losses."""
        own = [piece for piece, owner in zip(self.parts, self.owners, strict=True) if owner == rank]
        return [row for piece in own for row in range(piece.first, piece.first + piece.rows)]


def _width(losses: Tensor) -> int:
    return 8 if losses.dtype == torch.float64 else 4
