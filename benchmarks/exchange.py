"""Steps that workers share: what the exchange takes here, and a simulation of many workers that are slow at times and fail.

torchrun --nproc-per-node N benchmarks/exchange.py          the exchange of the message of a step, on this machine
python benchmarks/exchange.py --step 2.5                    steps of 2.5 s (median, of one worker), 8 to 1,024 workers
python benchmarks/exchange.py --step 2.5 --stall 0.01       and one step in a hundred of a worker takes five times as long

A step ends when the slowest worker has its losses and the messages have gone round. A worker that fails (exponential times) takes
the step under way with it; those that are left go on after a restart, with more pieces each, and one more restart has it back.
Beside it stands what `zotune estimate --workers` reckons of the same numbers.
"""

# N workers.

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass

import numpy as np

from zotune.estimates.fleet import Fleet, exchange_seconds, lost_to_failures, message_bytes, slowest
from zotune.workers.group import join
from zotune.workers.message import HEAD_BYTES, Message

STALL = 5.0  # times as long as its others a step takes that a worker stalls in


@dataclass(frozen=True)
class Simulated:
    """seconds: of a step, everything in; exchange, restarts: their share of the time; failures: how many workers failed."""

    seconds: float
    exchange: float
    restarts: float
    failures: int


def simulate(
    workers: int,
    pieces: int,
    step: float,
    fleet: Fleet,
    message: int,
    *,
    steps: int = 2000,
    stall: float = 0.0,
    seed: int = 0,
) -> Simulated:
    """pieces: of a worker, where all are there. step: median seconds of these. stall: chance that a worker's step takes `STALL`
    times as long.
    """
    draw = np.random.default_rng(seed)
    fails_at = draw.exponential(3600 * fleet.hours, workers)
    back_at = np.zeros(workers)
    now = exchanged = restarted = 0.0
    done = failures = 0
    while done < steps:
        alive = back_at <= now
        if not alive.any():
            now = back_at.min()
            continue
        count = int(alive.sum())
        each = step * -(-workers * pieces // count) / pieces  # those of who is away too
        times = each * np.exp(fleet.spread * draw.standard_normal(count))
        times[draw.random(count) < stall] *= STALL
        talk = exchange_seconds(count, message, fleet)
        end = now + times.max() + talk
        first = fails_at[alive].min()
        returns = back_at[~alive].min() if count < workers else np.inf
        if first <= end:  # the step is taken again by those that are left
            lost = np.flatnonzero(alive & (fails_at == first))
            back_at[lost] = first + fleet.repair
            fails_at[lost] = first + fleet.repair + draw.exponential(3600 * fleet.hours, len(lost))
            restarted += fleet.restart
            now, failures = first + fleet.restart, failures + len(lost)
            continue
        now, done, exchanged = end, done + 1, exchanged + talk
        if returns <= now:
            restarted += fleet.restart
            now += fleet.restart
    return Simulated(now / steps, exchanged / now, restarted / now, failures)


def reckoned(workers: int, pieces: int, step: float, fleet: Fleet, message: int) -> float:
    """Seconds of a step, as `zotune estimate` has them."""
    whole = step * slowest(workers, fleet.spread) + exchange_seconds(workers, message, fleet)
    return whole / (1 - lost_to_failures(workers, pieces, whole, fleet))


def measure(rounds: int, size: int) -> None:
    """The median and the 9th decile of one exchange, in every process at once."""
    workers = join()
    assert workers is not None
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        workers.exchange(Message(losses=b"\0" * size), size)
        took.append(time.perf_counter() - began)
    if workers.first:
        middle, late = np.quantile(took[rounds // 10 :], [0.5, 0.9])
        found = {"workers": workers.size, "bytes": workers.sent, "median_ms": 1e3 * middle, "decile_9_ms": 1e3 * late}
        print(json.dumps(found | {"ms_a_hop": 1e3 * middle / (workers.size - 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--step", type=float, default=2.5, help="median seconds of a worker's part of a step")
    parser.add_argument("--pieces", type=int, default=1, help="of a worker and step")
    parser.add_argument("--stall", type=float, default=0.0)
    parser.add_argument("--places", type=int, default=2)
    parser.add_argument("--rows", type=int, help="rows of a worker, where each has directions of its own")
    parser.add_argument("--spread", type=float, default=Fleet.spread)
    parser.add_argument("--hours", type=float, default=Fleet.hours)
    parser.add_argument("--restart", type=float, default=Fleet.restart)
    parser.add_argument("--latency", type=float, default=Fleet.latency)
    parser.add_argument("--bandwidth", type=float, default=Fleet.bandwidth)
    parser.add_argument("--steps", type=int, default=20_000)
    given = parser.parse_args()
    message = message_bytes(given.places, given.rows)
    if "RANK" in os.environ:
        measure(given.steps, message - HEAD_BYTES)
        return
    fleet = Fleet(given.latency, given.bandwidth, given.spread, given.hours, given.restart)
    print(
        "| workers | bytes each | s a step, simulated | reckoned | exchange % | restarts % | failures | of perfect speed % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for workers in (8, 32, 128, 512, 1024):
        found = simulate(workers, given.pieces, given.step, fleet, message, steps=given.steps, stall=given.stall)
        expected = reckoned(workers, given.pieces, given.step, fleet, message)
        print(
            f"| {workers:,} | {message} | {found.seconds:.3g} | {expected:.3g} | "
            f"{100 * found.exchange:.2g} | {100 * found.restarts:.2g} | {found.failures} | {100 * given.step / found.seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
