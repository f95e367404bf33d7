"""A step that workers share: what each computes, what travels, what all wait for, and what is lost with those that fail."""

# N workers, B rows of a step, M rows of a piece, C places of a row.

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from zotune.errors import InputError
from zotune.estimates.estimate import estimate
from zotune.estimates.needs import needs_of
from zotune.estimates.rates import Rates
from zotune.estimates.streaming import BUS
from zotune.models.loading import DTYPES
from zotune.workers.message import HEAD_BYTES, PLACE_BYTES, ROW_BYTES


@dataclass(frozen=True)
class Fleet:
    """What workers are like. latency: seconds until a message is with the next worker; bandwidth: bytes/s between two.

    spread: standard deviation of the logarithm of a worker's time for a step. hours: between failures of one worker, on average.
    restart: seconds until a group that has lost one goes on. repair: until that one is back.
    """

    latency: float = 2e-4
    bandwidth: float = 1.25e8
    spread: float = 0.05
    hours: float = 1000.0
    restart: float = 120.0
    repair: float = 1800.0


@dataclass(frozen=True)
class Shared:
    """Of a step. pieces: of the busiest worker. message: bytes from each worker. compute, exchange: seconds. waiting: for the
    slowest, beside its compute. lost: the share of time that failures cost. seconds: a step in all. alone: of one worker with all
    rows.

    peak: bytes of a worker. cards: that hold so much, and share its compute evenly. bus: seconds in which its weights would come
    over one card's bus instead. gradients: bytes that each worker would send for a first-order step, by a ring.
    """

    workers: int
    pieces: int
    message: int
    compute: float
    exchange: float
    waiting: float
    lost: float
    seconds: float
    alone: float
    peak: int
    cards: int
    bus: float
    gradients: int

    @property
    def speed(self) -> float:
        """Times that of one worker which fails and waits for nobody."""
        return self.alone / self.seconds


def message_bytes(places: int, rows: int | None = None) -> int:
    """Of one worker and step (`zotune.workers.message`). rows: its own, where each has its directions; None: rows share them.

    >>> message_bytes(2), message_bytes(32, rows=4)
    (48, 528)
    """
    return HEAD_BYTES + (PLACE_BYTES * places if rows is None else ROW_BYTES * places * rows)


def exchange_seconds(workers: int, message: int, fleet: Fleet) -> float:
    """Everybody's message to everybody, as gloo sends them: N − 1 times to the next one in a ring."""
    return (workers - 1) * (fleet.latency + message / fleet.bandwidth)


def slowest(workers: int, spread: float) -> float:
    """About what the slowest of N takes, in medians of one: e^(σ·Φ⁻¹((N − 3/8)/(N + 1/4))) (Blom 1958).

    >>> round(slowest(1, 0.1), 3), round(slowest(64, 0.1), 3)
    (1.0, 1.263)
    """
    return math.exp(spread * NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25)))


def lost_to_failures(workers: int, pieces: int, seconds: float, fleet: Fleet) -> float:
    """The share of time that failures cost: two restarts each and half a step that is taken again; and while a worker is away the
    others have its pieces. pieces: of a worker, where all are there.
    """
    rate = workers / (3600 * fleet.hours)
    away = rate * fleet.repair  # workers, on average
    gone = min(workers - 1, max(1, round(away)))
    slower = -(-workers * pieces // (workers - gone)) / pieces - 1 if gone else 0.0
    cost = rate * (2 * fleet.restart + seconds / 2) + (1 - math.exp(-away)) * slower
    return cost / (1 + cost)


def shared(
    config: Any,
    *,
    workers: int,
    micro_batch: int | None = None,
    method: str = "zo-sgd",
    queries: int | None = None,
    batch_size: int = 16,
    by_row: bool = False,
    dtype: str,
    rates: Rates,
    fleet: Fleet | None = None,
    room: int | None = None,
    crossing: float = 0.0,
    **common: Any,
) -> Shared:
    """Of a step of B rows in pieces of M [one a worker], dealt to N workers in turn. by_row: directions for each row.

    room: bytes of one card. crossing: seconds in which the layers that stream pass over its bus for one piece. Time by `estimate`,
    whose terms a piece's are. Raises InputError for more workers than pieces.
    """
    fleet = fleet or Fleet()
    piece = micro_batch or -(-batch_size // workers)
    pieces = -(-batch_size // piece)
    if pieces < workers:
        raise InputError(
            f"--workers {workers}: a step of {batch_size} rows has {pieces} pieces of {piece}; try --batch-size {workers * piece}"
        )
    needs = needs_of(method, queries)
    if needs.kind != "zeroth-order":
        raise InputError(f"--workers: share the places of zeroth-order steps, and {method} differentiates; use zo-sgd")
    made = estimate(config, method=method, queries=queries, batch_size=piece, dtype=dtype, rates=rates, **common)
    alone = estimate(config, method=method, queries=queries, batch_size=batch_size, dtype=dtype, rates=rates, **common)
    cards = max(1, -(-made.peak // room)) if room else 1
    own, each = -(-pieces // workers), max((made.step_seconds or 0.0) / cards, crossing)
    message = message_bytes(needs.places, own * piece if by_row else None)
    exchange = exchange_seconds(workers, message, fleet)
    compute = own * each
    waiting = compute * (slowest(workers, fleet.spread) - 1)
    whole = compute + waiting + exchange
    lost = lost_to_failures(workers, own, whole, fleet)
    gradients = 2 * (workers - 1) * made.trainable * DTYPES[dtype].itemsize // workers
    return Shared(
        workers, own, message, compute, exchange, waiting, lost, whole / (1 - lost),
        max((alone.step_seconds or 0.0) / cards, crossing), made.peak, cards, made.weights / BUS, gradients,
    )  # fmt: skip
