"""The losses that an estimator asks for, from whichever engine, of one batch or several."""

# Q queries, G directions over the rows of a step, B rows, P probes.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement
from zotune.engines.sequential import SequentialEngine, same_draws
from zotune.estimators import Estimator, TwoSided

Where = Callable[[int, int], "Displacement | HeldDisplacement"]


def probe(
    engine: SequentialEngine,
    estimator: Estimator,
    loss: Callable[[Any], Any],
    batches: Sequence[Any],
    at: Where,
    shares_G: Sequence[int] = (1,),
) -> list[Any]:
    """Losses (a 0-d float64 tensor, or whatever number the loss gave) in the order of the estimator's probes.

    at: (query, sign) → the displacement, of one direction or of G. shares_G: with several directions, how many of the
    step's rows, which run on over its batches, each has; losses then come direction by direction within a query.
    """
    if not isinstance(estimator, TwoSided):
        return _one_by_one(engine, estimator, loss, batches, at)
    found: list[Any] = []
    for query in range(estimator.queries):
        pairs: list[tuple[Any, Any]] = []
        first = 0
        for batch in batches:
            where = at(query, +1)
            if len(shares_G) > 1:
                directions, shares = _window(shares_G, first, _rows(batch, shares_G))
                first += sum(shares)
                pairs.append(engine.both(loss, batch, where.some(*directions), shares))
            else:
                pairs.append(engine.both(loss, batch, where.some(0, 1)))
        plus, minus = (_joined([pair[side] for pair in pairs]) for side in range(2))
        if len(shares_G) == 1:
            found += [_mean(plus), _mean(minus)]
            continue
        for side in (plus, minus):
            if not isinstance(side, Tensor) or side.numel() != sum(shares_G):
                size = side.numel() if isinstance(side, Tensor) else 1
                raise ValueError(
                    f"groups: the loss gives {size} numbers for {sum(shares_G)} rows; return one a row, in their order"
                )
        means = [_means(side.view(-1).double(), shares_G) for side in (plus, minus)]
        found += [loss for both in zip(*means, strict=True) for loss in both]
    return found


def _one_by_one(
    engine: SequentialEngine, estimator: Estimator, loss: Callable[[Any], Any], batches: Sequence[Any], at: Where
) -> list[Any]:
    found: list[Any] = []
    redraw = same_draws(engine.directions.params)
    for asked in estimator.probes:
        if found:
            redraw()
        where = at(asked.query, asked.sign)
        found.append(loss_at(engine, loss, batches, where))
    return found


def loss_at(
    engine: SequentialEngine, loss: Callable[[Any], Any], batches: Sequence[Any], at: Displacement | HeldDisplacement
) -> Any:
    """The loss over the batches at θ + displacement."""
    return _mean(_joined([engine.loss(partial(loss, batch), at) for batch in batches]))


def whole(loss: Callable[[Any], Any], batches: Sequence[Any]) -> Any:
    """The losses of all batches as the loss gives them, for differentiation."""
    return _joined([loss(batch) for batch in batches])


def _joined(losses: list[Any]) -> Any:
    for loss in losses:
        if not (isinstance(loss, Tensor) and loss.numel()):
            _refuse_no_loss(loss)
    if len(losses) == 1:
        return losses[0]
    if all(isinstance(loss, Tensor) for loss in losses):
        return torch.cat([loss.view(-1) for loss in losses])
    return torch.tensor([float(loss) for loss in losses], dtype=torch.float64)


def _refuse_no_loss(loss: Any) -> None:
    """Raises TypeError or ValueError, which name the closure, for what is no loss. The mean of no number would be a NaN, and
    a step with one is skipped: nobody would hear of it.
    """
    if loss is None:
        raise TypeError("the closure returned None; it has to return the loss")
    if isinstance(loss, (int, float)):
        return
    try:
        numbers = torch.as_tensor(loss, dtype=torch.float64).numel()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"the closure returned a {type(loss).__name__}; it has to return the loss, a number or a tensor"
        ) from None
    if not numbers:
        raise ValueError("the closure returned an empty tensor; it has to return the loss, of at least one row")


def _means(losses_B: Tensor, shares_G: Sequence[int]) -> list[Tensor]:
    """The mean over each direction's rows."""
    if len({*shares_G}) == 1:
        return list(losses_B.view(len(shares_G), -1).mean(1).unbind())
    return [part.mean() for part in losses_B.split(list(shares_G))]


def _mean(loss: Any) -> Any:
    return loss.detach().double().mean() if isinstance(loss, Tensor) else loss


def _rows(batch: Any, shares_G: Sequence[int]) -> int:
    from zotune.engines.following import rows_in

    return rows_in(batch) if isinstance(batch, dict) else sum(shares_G)


def _window(shares_G: Sequence[int], first: int, rows: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The directions (from, to) of the rows first … first + rows − 1, and how many of these rows each has."""
    inside, start, chosen = [], 0, []
    for g, share in enumerate(shares_G):
        own = min(start + share, first + rows) - max(start, first)
        if own > 0:
            chosen.append(g)
            inside.append(own)
        start += share
    return (chosen[0], chosen[-1] + 1), tuple(inside)


def shares(rows: int, groups: int) -> tuple[int, ...]:
    """How many of the rows each of G directions gets: row i under direction i·G // rows.

    >>> shares(10, 4)
    (3, 2, 3, 2)
    """
    if groups < 1 or rows < groups:
        raise ValueError(f"groups: {rows} rows for {groups} directions; each direction needs a row")
    bounds = [-(-rows * g // groups) for g in range(groups + 1)]
    return tuple(b - a for a, b in pairwise(bounds))


def spread(estimator: Estimator, losses_P: Sequence[Any], shares_G: Sequence[int], pairs: int) -> list[Any]:
    """d of each of the step's directions (queries × pairs), to be divided by eps: g = d/eps.

    With G of them over the rows each is weighted by n_k·pairs/B, so that −lr·g/pairs is −lr·(n_k/B)·g_k; a short batch
    has zeros for the directions that it lacks.
    """
    if len(shares_G) == 1 and pairs == 1:
        return estimator.differences(losses_P)
    directions, rows = len(shares_G), sum(shares_G)
    d_Q = TwoSided(len(losses_P) // 2).differences(losses_P)
    weights = [share * pairs / rows for share in shares_G]
    found: list[Any] = []
    for query in range(len(d_Q) // directions):
        own = d_Q[query * directions : (query + 1) * directions]
        found += [d if weight == 1 else d * weight for d, weight in zip(own, weights, strict=True)]
        found += [own[0] * 0.0] * (pairs - directions)
    return found


def spread_on_device(estimator: Estimator, losses_P: Tensor, shares_G: Sequence[int], pairs: int) -> Tensor:
    """`spread`, to the bit, as a tensor: a few operations for any number of directions."""
    if len(shares_G) == 1 and pairs == 1:
        return torch.stack(spread(estimator, list(losses_P), shares_G, pairs))
    rows = sum(shares_G)
    weights = [share * pairs / rows for share in shares_G]
    plus_QG, minus_QG = losses_P.view(-1, len(shares_G), 2).unbind(-1)
    d_QG = (plus_QG - minus_QG) / 2
    if any(weight != 1 for weight in weights):
        # by floats, one a direction: a tensor of weights would be a copy from the host, which a capture refuses
        d_QG = torch.stack([d_Q * weight for d_Q, weight in zip(d_QG.unbind(1), weights, strict=True)], 1)
    return torch.nn.functional.pad(d_QG, (0, pairs - len(shares_G))).flatten()


def sides(estimator: Estimator, losses_P: Sequence[float]) -> tuple[list[float], list[float]]:
    """The losses at θ + εz, and the others, of any number of directions."""
    signs = [asked.sign for asked in estimator.probes] * (len(losses_P) // len(estimator.probes))
    plus = [loss for loss, sign in zip(losses_P, signs, strict=True) if sign > 0]
    return plus, [loss for loss, sign in zip(losses_P, signs, strict=True) if sign <= 0]


def centre(estimator: Estimator, losses_P: Sequence[float], shares_G: Sequence[int]) -> float:
    """L(θ) as far as the probes tell it: with several directions, the mean over the rows."""
    if len(shares_G) == 1:
        return estimator.centre(losses_P)
    queries = len(losses_P) // (2 * len(shares_G))
    means = [(losses_P[2 * k] + losses_P[2 * k + 1]) / 2 for k in range(len(losses_P) // 2)]
    return sum(share * m for share, m in zip(list(shares_G) * queries, means, strict=True)) / (queries * sum(shares_G))
