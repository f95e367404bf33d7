"""What a run takes where nothing of its steps is given: what was measured best on the device at hand.

That is of scheme `full` and of losses with a gradient. Whoever names a method, a rate, an eps or anything else of a step has that
method's own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zotune.files.checked import flag
from zotune.files.reading import load_yaml
from zotune.options.step import StepOptions

BY_DEVICE: dict[str, dict[str, Any]] = {
    "cuda": {"method": "leave-one-out", "queries": 32, "groups": "batch", "lr": "auto", "eps": 1e-2},
    "cpu": {},  # the method's own, as everywhere else: at equal passes nothing was shown to be better (docs/log.md, 2026-12-01)
}
PLAIN = "zo-sgd"  # the method of all others
ROOM = 0.5  # of a card's memory: what weights, and as much again as what trains of them, may take where rounding is compensated
FOR_ANY_METHOD = {"weight_decay", "rounding", "forward_tokens"}  # options of a step that leave the choice to the table
SLOPES = ("answer", "candidates")  # losses with a gradient


def by_default(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run takes for want of any, from the table; {} where something of its steps is given.

    A run that is resumed goes on with what it began with, on whatever device.
    """
    if any(given.get(name) is not None for name in set(StepOptions.model_fields) - FOR_ANY_METHOD):
        return {}
    if str(given.get("resume")).lower() == "true" and (begun := _begun(given.get("output"))):
        return begun
    if given.get("scheme", "full") != "full" or given.get("loss", "answer") not in SLOPES:
        return {}
    return dict(BY_DEVICE[_device(given.get("device"))])


def rounding_by_default(weights: int, narrow: int, memory: int) -> str:
    """Of a run that takes the table's options. In bytes, weights: of the model; narrow: of those that train in 16 bits; memory: the
    card's.

    >>> rounding_by_default(270 << 20, 270 << 20, 16 << 30), rounding_by_default(14 << 30, 14 << 30, 24 << 30)
    ('compensated', 'nearest')
    """
    return "compensated" if narrow and weights + narrow <= ROOM * memory else "nearest"


def flags_of(taken: Mapping[str, Any]) -> str:
    """
    >>> flags_of({"method": "leave-one-out", "eps": 1e-2})
    '--method leave-one-out --eps 0.01'
    """
    return " ".join(f"{flag(name)} {value}" for name, value in taken.items())


def _begun(output: Any) -> dict[str, Any]:
    """What a run of one of the defaults has on record."""
    path = Path(str(output)).expanduser() / "config.yaml"
    if not path.is_file():
        return {}
    old = load_yaml(path, str(path))
    names = {name for taken in BY_DEVICE.values() for name in taken}
    methods = {PLAIN, *(taken.get("method", PLAIN) for taken in BY_DEVICE.values())}
    if not isinstance(old, Mapping) or old.get("method") not in methods:
        return {}
    return {name: old[name] for name in (*names, "lr_schedule", "rounding") if old.get(name) is not None}


def _device(named: Any) -> str:
    if named in (None, "auto"):
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if named == "cuda" else "cpu"
