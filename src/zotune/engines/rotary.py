"""Rotary embeddings, which transformers' models write out in ten operations: one pass for queries and keys.

They are a function of a model's own file, `apply_rotary_pos_emb`. What it computes is found out by trying it.
"""

# B rows, H heads, T tokens, D width of a head.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zotune.engines.parts import kernels_for

NAME = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Rotary:
    """q and k ← x·cos + (−x₂, x₁)·sin, with x₁ and x₂ the halves of x. plain: the model's own function."""

    plain: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own function gives; by it, wherever the kernel does not serve."""
        with torch._C.DisableTorchFunction():  # a mode that follows reads has nothing to see here, and takes its time
            turned = self._by_kernel(args, kwargs)
        return self.plain(*args, **kwargs) if turned is None else turned

    def _by_kernel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        kernels = kernels_for(args[0], "between") if len(args) == 4 and isinstance(args[0], Tensor) else None
        if kernels is None or torch.is_grad_enabled() or kwargs.keys() - {"unsqueeze_dim"}:
            return None
        fits = kwargs.get("unsqueeze_dim", 1) == 1 and _serves(*args)
        return kernels.rotary(*args) if fits else None


def _serves(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    if any(type(x) is not Tensor or x.dtype != q.dtype or x.stride(-1) != 1 for x in (q, k, cos, sin)):
        return False
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or q.shape[3] % 2:
        return False
    rows, _, tokens, width = q.shape
    whole = k.shape[0] == rows and k.shape[2:] == q.shape[2:] and cos.shape[1:] == (tokens, width)
    return bool(whole and cos.shape[0] in (1, rows))


def found(file: ModuleType) -> Rotary | None:
    """The rotary embedding of a file (a Python module) that models are written in, if that is the one we know."""
    plain = getattr(file, NAME, None)
    if not callable(plain) or isinstance(plain, Rotary):
        return None
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(*s, generator=draw) for s in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        given = plain(q, k, cos, sin)
        wanted = [x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None] for x in (q, k)]
        same = len(given) == 2 and all(torch.allclose(x, y, 1e-5, 1e-6) for x, y in zip(given, wanted, strict=True))
    except Exception:
        return None  # it wants something else
    return Rotary(plain) if same else None
