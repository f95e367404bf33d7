"""What a step of a method asks of a machine: the one place where estimates read a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zotune.errors import InputError
from zotune.methods import METHODS, find, make_method, plugins, suggested


@dataclass(frozen=True)
class Needs:
    """kind: losses alone, a derivative carried forward, or a gradient. forwards: evaluations of the loss on a batch;
    once: those beside them, at a run's first step.

    state_copies: of what trains. by_tiles: the update is a rule's arithmetic on tiles of the weights, not coefficients alone.
    places: those evaluations of its estimate, of which engines take several in one forward. options: those that it
    has of its own, queries among them. of_rows: directions know their rows, which no estimate does. low_rank: engine
    lowrank alone evaluates them; the state of those in a subspace is small beside the weights, and left out.
    """

    kind: Literal["zeroth-order", "forward-mode", "first-order"]
    forwards: int
    once: int
    state_copies: int
    by_tiles: bool
    places: int
    options: tuple[str, ...]
    of_rows: bool
    low_rank: bool


def needs_of(name: str, queries: int | None = None, estimator: str | None = None) -> Needs:
    """Of a method, registered or somebody's own, by its own defaults where nothing is given; options that it lacks are left out.

    Raises InputError. An own method is imported: its name is one that the user gave.
    """
    if name not in METHODS and name not in plugins() and ":" not in name:
        raise InputError(f"--method {name}: {suggested(name)}")
    try:
        options = tuple(find(name).options)
    except ValueError as error:
        raise InputError(f"--method {name}: {error}") from None
    asked = {"queries": queries, "estimator": estimator}
    try:
        options = tuple(find(name).options)
        method = make_method(
            name, **{key: value for key, value in asked.items() if value is not None and key in options}
        )
    except ValueError as error:
        raise InputError(f"--method {name}: {error}") from None
    kind, rule = method.kind, method.rule
    return Needs(
        kind,  # type: ignore[arg-type]
        method.forwards,
        method.forwards_once,
        0 if method.subspace is not None else rule.state_copies,
        by_tiles=kind == "first-order" or not (rule.linear or rule.extra_forwards or method.subspace is not None),
        places=len(method.signs),
        options=options,
        of_rows=method.own_inputs,
        low_rank=method.low_rank,
    )
