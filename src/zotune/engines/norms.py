"""RMS norms of a model in one kernel, each part with its own scale.

Torch has no function that models call for this norm: each writes it out in five or six of them, each a pass over the hidden
states. What a module computes is found out by trying it, not by its name.
"""

# P parts, n rows of the hidden states, N their width.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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


class FusedNorms:
    """The modules among those that a forward calls whose norm of a perturbed weight can be one kernel."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._params = {id(p) for p in params}
        self._found: dict[nn.Module, RmsNorm] = {}
        self._tried: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._found)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Look at each module that is called meanwhile."""
        handle = nn.modules.module.register_module_forward_pre_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, module: nn.Module, args: Any) -> None:
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in self._params or weight.dim() != 1 or id(module) in self._tried:
            return
        self._tried.add(id(module))
        with torch._C.DisableTorchFunction():
            known = recognised(module)
        if known is not None:
            self._found[module] = known

    @contextmanager
    def standing_in(self, mode: PartedReads) -> Iterator[None]:
        """Those modules compute by the kernel meanwhile, where they see the batch."""
        # more may be learned meanwhile; where somebody has put a forward of theirs on a module since, that is what it does
        some = [(module, norm) for module, norm in self._found.items() if "forward" not in module.__dict__]
        for module, norm in some:
            module.forward = partial(_forward, mode, module, module.forward, norm)
        try:
            yield
        finally:
            for module, _ in some:
                del module.forward  # the class's own again


def _forward(mode: PartedReads, module: Any, plain: Any, norm: RmsNorm, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):  # with a gate, say: it may do more than a norm
        return plain(*args, **kwargs)
    x = args[0]
    scale_PN, kernels = mode.stack_of(module.weight), kernels_for(x)
    served = kernels is not None and scale_PN is not None and mode.parts.equal and mode.is_batch(x)
    if not served or not x.is_contiguous() or x.dtype != module.weight.dtype or x.shape[-1] > kernels.LONGEST_NORM:
        return plain(x)
    x_PMN = mode.parts.by_part(x).flatten(1, -2)
    return kernels.rms_norm(x_PMN, scale_PN, norm.eps, norm.offset).view(x.shape)
