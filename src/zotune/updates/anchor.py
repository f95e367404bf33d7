"""Anchored decay, θ ← θ − k·(θ − θ₀): against forgetting what the weights knew when training began.

θ₀ is a copy of the trainable weights in their own dtype, made before the first update that pulls and kept in the optimizer's state,
so that a resumed run has it from its checkpoint and a replay from its base. What a reward run perturbs and moves is θ; the records
of its steps hold no sum from which θ − θ₀ could be had without all directions of all steps before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.updates.rule import State

TILE = 1 << 22  # elements at a time


def pull(params: Sequence[Any], state: State, k: float) -> None:
    """θ + r ← (θ + r) − k·(θ + r − θ₀), in place; r: what compensated rounding keeps, where there is any. Sums are float32 (float64
    for float64 weights), tile by tile. Source: ES, arXiv 2509.24372.
    """
    import torch

    for param in params:
        own = state[param]
        if "anchor" not in own:
            own["anchor"] = param.detach().clone()
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        flat, base, lost = param.data.reshape(-1), own["anchor"].reshape(-1), own.get("residual")
        lost = None if lost is None else lost.view(-1)
        for first in range(0, flat.numel(), TILE):
            part = slice(first, first + TILE)
            total = flat[part].to(wide)
            if lost is not None:
                total += lost[part].to(wide)
            total += k * (base[part].to(wide) - total)
            flat[part] = total.to(param.dtype)
            if lost is not None:
                lost[part] = (total - flat[part].to(wide)).to(param.dtype)
        if not param.data.is_contiguous():  # reshape made a copy
            param.data.copy_(flat.view(param.shape))
