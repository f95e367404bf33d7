"""What a step moves over the bus where layers stream from the host, and how long that takes."""

from __future__ import annotations

from zotune.estimates.memory import readable
from zotune.streaming import Plan

BUS = 55e9  # bytes a second each way between page-locked memory and a card: PCIe 5.0 x16, less what its packets take
RESERVE = 512 << 20  # bytes of the budget for the activations of the least forward that is worth a crossing


def bus_seconds(plan: Plan, writes: bool, forwards: int = 1, bus: float = BUS) -> float:
    """Seconds of a step whose places take so many forwards: each brings every block once; what trains goes back once, behind them.

    bus: bytes a second, one way; the two ways work at once.
    """
    return max(forwards, int(writes)) * plan.streams / bus


def said(plan: Plan, budget: int, writes: bool, forwards: int = 1, bus: float = BUS) -> str:
    """Memory on the card, bytes a step and expected seconds, in a line. Raises InputError where the budget is too small."""
    slots = plan.slots(budget, RESERVE)
    back = "as many back with each update" if writes else "nothing back"
    return (
        f"{readable(plan.stays)} stay on the card, {slots} layers of {readable(plan.room)} at a time; a step brings "
        f"{readable(forwards * plan.streams)}, {back}: {bus_seconds(plan, writes, forwards, bus):.2f} s at {bus / 1e9:.0f} GB/s "
        "each way, or what its arithmetic takes if longer"
    )
