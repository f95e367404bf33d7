"""Steps on weights that stream from the host: which there are, and how they are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.engines.streamed import follow, serves
from zotune.errors import InputError
from zotune.streaming import streamed

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer


def streams(of: ZeroOrderOptimizer) -> None:
    """Where any of an optimizer's weights stream, their updates wait for them, and the host takes every step.

    A captured graph would fix which slot holds which block, and with blocks this large a launch costs nothing beside its work.
    Raises InputError for what does not stream.
    """
    trains = [p for group in of.param_groups for p in group["params"]]
    weights = streamed(trains)
    if weights is None:
        return
    if {id(p) for p in trains} & {id(p) for block in weights.in_files for p in block.params}:
        raise InputError(
            "--max-host-memory: layers that stay in their files are read alone, and these train; use --scheme lora, prefix or "
            "prompt, or give as much memory as the layers take"
        )
    if why := not_served(of):
        raise InputError(
            f"--max-gpu-memory: {why}; what streams: --engine lowrank, dual or sequential, with a method whose update is "
            "coefficients of directions alone (zo-sgd, leave-one-out, fzoo), rounded to nearest"
        )
    of.captured.wanted = False
    for engine in of.blocks:
        follow(engine)


def not_served(of: ZeroOrderOptimizer) -> str:
    """The first thing that does not go with weights that stream, in words."""
    method, more = of.method, of.enhancements
    if method.first_order or method.forward_mode:
        return f"method {of.choices.name!r} differentiates through all layers at once"
    if more.blocks is not None or more.hybrid is not None or more.sparsity is not None:
        return "blocks, hybrid and sparsity read weights outside a forward"
    if not method.rule.linear or method.rule.extra_forwards or getattr(method.rule, "anchor", 0):
        return f"the update of method {of.choices.name!r} reads the weights, or keeps numbers as large beside them"
    if method.rule.rounding != "nearest":
        return f"rounding={method.rule.rounding!r} keeps a number beside each weight"
    if any(group["weight_decay"] for group in of.param_groups):
        return "weight_decay takes a pass over all weights of its own"
    if of.sharing.workers is not None:
        return "workers compare all weights"
    if not serves(of.engine):
        return f"engine {of.engine.name!r} of method {of.choices.name!r} keeps bases or sums of all layers"
    return ""
