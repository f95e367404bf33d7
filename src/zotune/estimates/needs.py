"""What a step of a method asks of a machine: the one place where estimates read a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zotune.errors import InputError
from zotune.methods import METHODS, find, make_method, plugins, suggested


@dataclass(frozen=True)
class Needs:
    """kind: losses alone, a derivative carried forward, or a gradient. forwards: evaluations of the loss on a batch.

    state_copies: of what trains. by_tiles: the update is a rule's arithmetic on tiles of the weights, not coefficients alone.
    paired: each direction is probed at both signs, which engines evaluate in one forward. options: those that it
    has of its own, queries among them. of_rows: directions know their rows, which no estimate does.
    """

    kind: Literal["zeroth-order", "forward-mode", "first-order"]
    forwards: int
    state_copies: int
    by_tiles: bool
    paired: bool
    options: tuple[str, ...]
    of_rows: bool


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
    given = {key: value for key, value in asked.items() if value is not None and key in options}
    try:
        method = make_method(name, **given)
    except ValueError as error:
        raise InputError(f"--method {name}: {error}") from None
    kind, rule = method.kind, method.rule
    return Needs(
        kind,  # type: ignore[arg-type]
        method.forwards,
        rule.state_copies,
        by_tiles=kind == "first-order" or not (rule.linear or rule.extra_forwards),
        paired={*method.signs} == {+1, -1},
        options=options,
        of_rows=method.own_inputs,
    )
