"""The losses that a method asks for, from whichever engine, of one batch or several."""

# C copies of a batch, K directions over the rows of a step, B rows, Q directions of a step (queries × pairs), G parameter groups.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement
from zotune.engines import Engine
from zotune.engines.forward_mode import ForwardModeEngine
from zotune.engines.places import Copy, Places, as_losses, rows_in
from zotune.engines.reads import same_draws
from zotune.step.arithmetic import Given, clipped, projected
from zotune.step.pieces import Piece, Sharing

if TYPE_CHECKING:
    from zotune.methods import Method
    from zotune.step.optimizer import ZeroOrderOptimizer
    from zotune.updates import Conservative

Loss = Callable[[Any], Any]


def look(
    engine: Engine,
    method: Method,
    loss: Loss,
    batches: Sequence[Any],
    at: Displacement | HeldDisplacement,
    given: Given,
    shares_K: Sequence[int],
    sharing: Sharing,
) -> tuple[Tensor, Tensor]:
    """Losses (C, K) float64 and projected gradients (G, Q): what the method sees of these batches.

    at: the step's directions, each with its eps; with 1 for directional derivatives.
    """
    if method.estimator is None:
        return derivatives(engine, loss, batches, at, given)
    losses_CK = losses_at(engine, method, loss, batches, at, shares_K, given.pairs, sharing)
    if not isinstance(at, HeldDisplacement):  # the host's own numbers follow: one wait for the device
        losses_CK = losses_CK.cpu()
    return losses_CK, projected(method.estimator, method.rule, losses_CK, given)


def losses_at(
    engine: Engine,
    method: Method,
    loss: Loss,
    batches: Sequence[Any],
    at: Displacement | HeldDisplacement,
    shares_K: Sequence[int],
    pairs: int,
    sharing: Sharing,
) -> Tensor:
    """(C, K) float64: the mean over the rows of each place. The rows of a step run on over its batches."""
    assert method.estimator is not None
    probes, first = method.estimator.probes, 0

    def places(first: int, rows: int) -> Places:
        """Of rows first, first + 1, … of the step."""
        start, shares = window(shares_K, first, rows) if len(shares_K) > 1 else (0, (1,))
        return Places(at, tuple(Copy(p.sign, p.query * pairs + start if p.sign else 0) for p in probes), shares)

    if not sharing.whole:
        means_CK = sharing.means(
            engine, batches, shares_K, len(probes),
            evaluate=lambda piece: engine.losses(loss, piece.batch, places(piece.first, piece.rows)),
            overlook=lambda piece: engine.overlook(loss, piece.batch, places(piece.first, piece.rows)),
        )  # fmt: skip
        return -means_CK if method.maximize else means_CK
    found = []
    for batch in batches:
        rows = rows_in(batch) if isinstance(batch, dict) else sum(shares_K)
        found.append(engine.losses(loss, batch, places(first, rows)))
        first += rows
    losses_CB = (found[0] if len(found) == 1 else torch.cat([some.double() for some in found], 1)).double()
    if method.maximize:
        losses_CB = -losses_CB
    if len(shares_K) == 1:
        return losses_CB.mean(1, keepdim=True)
    if losses_CB.shape[1] != sum(shares_K):
        raise ValueError(
            f"groups: the loss gives {losses_CB.shape[1]} numbers for {sum(shares_K)} rows; return one a row, in their order"
        )
    if len({*shares_K}) == 1:
        return losses_CB.unflatten(1, (len(shares_K), -1)).mean(2)
    return torch.stack([part.mean(1) for part in losses_CB.split(list(shares_K), 1)], 1)


def derivatives(
    engine: Engine, loss: Loss, batches: Sequence[Any], along: Displacement | HeldDisplacement, given: Given
) -> tuple[Tensor, Tensor]:
    """L(θ) of each direction's forward (Q, 1), and the derivatives along the directions (G, Q), alike for all groups."""
    assert isinstance(engine, ForwardModeEngine)
    redraw = same_draws(engine.directions.params)
    found = []
    for q in range(len(along.seeds_Q)):
        redraw()
        found.append(engine.derivative(lambda: whole(loss, batches), along.some(q, q + 1)))
    losses_Q, d_Q = (torch.stack(numbers).double() for numbers in zip(*found, strict=True))
    if not isinstance(along, HeldDisplacement):
        losses_Q, d_Q = torch.stack([losses_Q, d_Q]).cpu().unbind()
    return losses_Q[:, None], clipped(d_Q.expand(len(given.eps_G), -1), given.most)


def best_of_three(
    engine: Engine,
    rule: Conservative,
    loss: Loss,
    batches: Sequence[Any],
    losses_CK: Tensor,
    signs: Sequence[int],
    move: Displacement | HeldDisplacement,
    sharing: Sharing,
) -> Tensor:
    """0-d: which of θ, θ + move and θ − move has the least loss on the step's batches: 0, 1 or 2."""
    redraw = same_draws(engine.directions.params)
    here = [losses_CK[c, 0] for c, sign in enumerate(signs) if sign == 0][:1]
    places: list[Displacement | HeldDisplacement] = [Displacement(), move, move.negated()]
    if not sharing.whole:
        there = places[len(here) :]

        def evaluate(piece: Piece) -> Tensor:
            again = same_draws(engine.directions.params)
            found = []
            for at in there:
                again()
                found.append(as_losses(engine.loss(partial(loss, piece.batch), at)))
            return torch.stack(found)

        means_C1 = sharing.means(engine, batches, (1,), len(there), evaluate, lambda piece: None)
        return rule.choose(torch.stack([*here, *means_C1[:, 0].to(losses_CK.device)]))
    found = []
    for at in places[len(here) :]:
        redraw()
        found.append(loss_at(engine, loss, batches, at))
    return rule.choose(torch.stack([*here, *(one.to(losses_CK.device) for one in found)]))


def loss_at(engine: Engine, loss: Loss, batches: Sequence[Any], at: Displacement | HeldDisplacement) -> Tensor:
    """0-d float64: the loss over the batches at θ + displacement."""
    found = [as_losses(engine.loss(partial(loss, batch), at)) for batch in batches]
    return (found[0] if len(found) == 1 else torch.cat(found)).double().mean()


def whole(loss: Loss, batches: Sequence[Any]) -> Any:
    """The losses of all batches as the loss gives them, for differentiation."""
    losses = [loss(batch) for batch in batches]
    for one in losses:
        if not (isinstance(one, Tensor) and one.numel()):
            as_losses(one)  # what is no loss raises
    if len(losses) == 1:
        return losses[0]
    if all(isinstance(one, Tensor) for one in losses):
        return torch.cat([one.view(-1) for one in losses])
    return torch.tensor([float(one) for one in losses], dtype=torch.float64)


def window(shares_K: Sequence[int], first: int, rows: int) -> tuple[int, tuple[int, ...]]:
    """The first direction of the rows first … first + rows − 1, and how many of these rows it and each further one has.

    >>> window((2, 3, 2), 3, 3)
    (1, (2, 1))
    """
    inside, start, chosen = [], 0, []
    for k, share in enumerate(shares_K):
        own = min(start + share, first + rows) - max(start, first)
        if own > 0:
            chosen.append(k)
            inside.append(own)
        start += share
    return chosen[0], tuple(inside)


def shares(rows: int, groups: int) -> tuple[int, ...]:
    """How many of the rows each of so many directions gets: row i under direction i·K // rows.

    >>> shares(10, 4)
    (3, 2, 3, 2)
    """
    if groups < 1 or rows < groups:
        raise ValueError(f"groups: {rows} rows for {groups} directions; each direction needs a row")
    bounds = [-(-rows * g // groups) for g in range(groups + 1)]
    return tuple(b - a for a, b in pairwise(bounds))


def rows_shared(
    of: ZeroOrderOptimizer, closure: Callable[..., Any], given: bool, batches: Sequence[Any]
) -> tuple[int, ...]:
    """How many of a step's rows each direction has; (1,) where one has all. given: the batches; else the closure tells by what it
    returns at θ."""
    if of.groups == 1:
        return (1,)
    if given:
        rows = of.sharing.rows(batches)
    else:
        losses = of.engine.loss(closure, Displacement())
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise ValueError(f"groups={of.groups!r} needs a loss of each row; the closure returns one number")
        rows = losses.numel()
    directions = rows if of.groups == "batch" else min(int(of.groups), rows)
    of.pairs = max(of.pairs, directions)
    return shares(rows, directions)


def sides(signs: Sequence[int], losses_P: Sequence[float], directions: int = 1) -> tuple[list[float], list[float]]:
    """The losses at θ + εz, and the others, in order. signs: of the copies. directions: over the rows of each, see `StepRecord`.

    >>> sides((1, -1), (1.0, 2.0, 3.0, 4.0), directions=2)
    ([1.0, 2.0], [3.0, 4.0])
    """
    signs_P = [sign for sign in signs for _ in range(directions)] * (len(losses_P) // (len(signs) * directions))
    plus = [loss for loss, sign in zip(losses_P, signs_P, strict=True) if sign > 0]
    return plus, [loss for loss, sign in zip(losses_P, signs_P, strict=True) if sign <= 0]
