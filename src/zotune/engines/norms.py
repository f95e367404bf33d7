"""RMS norms of a model in one kernel, each part with its own scale.

Torch has no function that models call for this norm: each writes it out in five or six of them, each a pass over the hidden
states. What a module computes is found out by trying it, not by its name.
"""

# P parts, n rows of the hidden states, N their width.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.engines.parts import PartedReads, kernels_for

EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(frozen=True)
class RmsNorm:
    """y = x/√(mean(x²) + eps)·(weight + offset); offset 1 where the weight is kept as what it adds to 1 (Gemma)."""

    eps: float
    offset: float

    def forward(self, mode: PartedReads | None, module: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):  # with a gate, say: it may do more than a norm
            return plain(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # a mode that follows reads has nothing to see here, and takes its time
            y = self._by_kernel(mode, module, args[0])
        return plain(args[0]) if y is None else y

    def _by_kernel(self, mode: PartedReads | None, module: Any, x: Tensor) -> Tensor | None:
        kernels, still = kernels_for(x), mode is None  # no direction displaces it
        scale_PN = module.weight.data[None] if mode is None else mode.stack_of(module.weight)
        if mode is not None and scale_PN is None and not mode.is_parted(module.weight):
            scale_PN, still = module.weight.data[None], True
        served = kernels is not None and scale_PN is not None
        served = served and (mode is None or still or (mode.parts.equal and mode.is_batch(x)))
        if not served or not x.is_contiguous() or x.dtype != module.weight.dtype or x.shape[-1] > kernels.LONGEST_NORM:
            return None
        x_PMN = x.view(1, -1, x.shape[-1]) if mode is None or still else mode.parts.by_part(x).flatten(1, -2)
        return kernels.rms_norm(x_PMN, scale_PN, self.eps, self.offset).view(x.shape)


def stand_in(module: nn.Module, params: set[int]) -> RmsNorm | None:
    """What the module computes, if that is an RMS norm of one of these parameters."""
    weight = module._parameters.get("weight")
    return recognised(module) if weight is not None and id(weight) in params and weight.dim() == 1 else None


def recognised(module: nn.Module) -> RmsNorm | None:
    """What the module computes, if that is an RMS norm: tried on random rows with random weights. None if it is not.

    A norm in 16 bits may round once more than this one does on the way; nothing else may differ.
    """
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if list(own) != ["weight"] or weight is None or weight.dim() != 1 or "forward" in module.__dict__:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    eps = next((float(v) for n in EPS_NAMES if isinstance(v := getattr(module, n, None), float)), None)
    if eps is None:
        return None
    draw = torch.Generator().manual_seed(0)
    width = len(weight)
    tried = torch.randn(width, generator=draw).to(weight.device, weight.dtype)
    x = torch.randn(3, width, generator=draw) * torch.tensor([[1.0], [30.0], [2 * eps**0.5]])  # the last shows eps
    x = x.to(weight.device, weight.dtype)
    bare = object.__new__(type(module))  # its forward alone: nobody's hooks see the trial
    bare.__dict__.update(module.__dict__, _parameters={"weight": nn.Parameter(tried, requires_grad=False)})
    try:
        found = type(module).forward(bare, x)
    except Exception:
        return None  # it wants more than hidden states
    if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
        return None
    normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    room = 4 * torch.finfo(x.dtype).eps if x.dtype != torch.float64 else 1e-6  # some compute in float32 always
    for offset in (0.0, 1.0):
        wanted = normed * (tried.double() + offset)
        if bool(((found.double() - wanted).abs() <= room * (wanted.abs() + normed.abs())).all()):
            return RmsNorm(eps, offset)
    return None
