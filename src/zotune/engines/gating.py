"""Gated feed-forward layers, down(gate(x₁)·x₂) with x₁ and x₂ products of x, whose gate takes one pass between the products.

What a module computes is found out by trying it on small products of its own, not by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.engines.parts import PartedReads, kernels_for

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu,
}  # fmt: skip
PRODUCTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Gated:
    """y = down(gate(gate_proj(x))·up_proj(x)). gate: a name of GATES."""

    gate: str

    def forward(self, mode: PartedReads | None, module: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        if x is None or torch.is_grad_enabled() or (kernels := kernels_for(x, "between")) is None:
            return plain(*args, **kwargs)
        if mode is not None and (y := mode.gated(x, module.gate_proj, module.up_proj, self.gate)) is not None:
            return module.down_proj(y)
        a, b = module.gate_proj(x), module.up_proj(x)
        if type(a) is not Tensor or type(b) is not Tensor or a.shape != b.shape or a.dtype != b.dtype:
            return module.down_proj(GATES[self.gate](a) * b)
        with torch._C.DisableTorchFunction():
            y = kernels.gated(a.contiguous(), b.contiguous(), self.gate)
        return module.down_proj(y)


class _Product(nn.Module):
    def __init__(self, wide: int, out: int, draw: torch.Generator) -> None:
        super().__init__()
        self.values = torch.randn(out, wide, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values)


def stand_in(module: nn.Module, params: set[int]) -> Gated | None:
    """What the module computes, if that is a gated feed-forward layer."""
    if not all(isinstance(module._modules.get(name), nn.Module) for name in PRODUCTS) or "forward" in module.__dict__:
        return None
    others = {name: child for name, child in module._modules.items() if name not in PRODUCTS}
    if any(True for child in others.values() if child is not None for _ in child.parameters()) or module._parameters:
        return None
    draw = torch.Generator().manual_seed(0)  # its own: whether a loss draws from torch's is being watched
    products = dict(zip(PRODUCTS, (_Product(4, 6, draw), _Product(4, 6, draw), _Product(6, 4, draw)), strict=True))
    bare = object.__new__(type(module))  # its forward alone: nobody's hooks see the trial
    bare.__dict__.update(module.__dict__, _modules=others | products)
    x = 2 * torch.randn(3, 4, generator=draw)
    try:
        with torch.no_grad():
            found = type(module).forward(bare, x)
            a, b = products["gate_proj"](x), products["up_proj"](x)
            for name, gate in GATES.items():
                wanted = products["down_proj"](gate(a) * b)
                if (
                    isinstance(found, Tensor)
                    and found.shape == wanted.shape
                    and torch.allclose(found, wanted, 1e-5, 1e-5)
                ):
                    return Gated(name)
    except Exception:
        return None  # it wants more than hidden states
    return None
