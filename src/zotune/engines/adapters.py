"""LoRA's term of a linear map by two kernels, each part with its own A and B.

PEFT keeps adapters in float32, mostly beside a narrower base, so its forward is a cast, two thin products, a scaling, an
addition in the wider format and a cast back, each a pass over the hidden states. One kernel reads x, the other adds to the
base's outputs.
"""

# P parts, M rows of a part, D inputs, R the adapter's rank, S slices of a sum over D.

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.engines.parts import PartedReads, Values, kernels_for

SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Adapter:
    """y = base(x) + scaling·(x·Aᵀ)·Bᵀ, the sum rounded once to base's dtype."""

    def forward(self, mode: PartedReads | None, module: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        if mode is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):  # with a name for each row, say
            return plain(*args, **kwargs)
        x = args[0]
        with torch._C.DisableTorchFunction():
            term = _term(mode, module, x)
        if term is None:
            return plain(x)
        y = module.base_layer(x)
        with torch._C.DisableTorchFunction():
            if y.dtype not in SERVED or y.shape != (*x.shape[:-1], term.b.w.shape[1]):
                return plain(x)  # no linear map's outputs
            if not _is_ours(y, x, module.base_layer):
                y = y.clone(memory_format=torch.contiguous_format)
            t_SPMR = term.kernels.adapter_inner(term.x_PMD, term.a)
            term.kernels.adapter_outer(mode.parts.by_part(y).flatten(1, -2), t_SPMR, term.b, term.scaling)
        return y


def stand_in(module: nn.Module, params: set[int]) -> Adapter | None:
    """For a linear map that PEFT has adapted, by its own forward, with an adapter among these parameters."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # who has not imported it has no such module
    if peft is None or not isinstance(module, peft.Linear) or type(module).forward is not peft.Linear.forward:
        return None
    maps = [*module.lora_A.values(), *module.lora_B.values()]
    perturbed = any(id(p) in params for m in maps for p in m.parameters())
    return Adapter() if perturbed and "forward" not in module.__dict__ else None


@dataclass(frozen=True)
class _Term:
    """scaling·(x·Aᵀ)·Bᵀ for an x that the kernels serve."""

    kernels: Any
    x_PMD: Tensor
    a: Values
    b: Values
    scaling: float


def _term(mode: PartedReads, module: Any, x: Tensor) -> _Term | None:
    """What the module adds to its base's outputs, where that is one plain adapter's term and the kernels serve it."""
    kernels, name = kernels_for(x), _only_adapter(module)
    if kernels is None or name is None or not mode.parts.equal or not mode.is_batch(x):
        return None
    if x.dtype not in SERVED or x.dim() < 2 or x.numel() == 0 or x.stride(-1) != 1:
        return None
    x_PMD = mode.parts.by_part(x).flatten(1, -2)
    if x_PMD.data_ptr() != x.data_ptr():  # rows that do not follow each other were copied
        return None
    a, b = (mode.values_of(maps[name].weight) for maps in (module.lora_A, module.lora_B))
    if a is None or b is None or not _fits(kernels, a) or not _fits(kernels, b):
        return None
    if a.w.shape[2] != x.shape[-1] or a.w.shape[1] != b.w.shape[2] or a.w.shape[1] > kernels.WIDEST_ADAPTER:
        return None
    return _Term(kernels, x_PMD, a, b, float(module.scaling[name]))


def _only_adapter(module: Any) -> str | None:
    """The name of the one adapter that works there as LoRA was written down, and as nobody has changed it."""
    names = module.active_adapters
    if module.disable_adapters or module.merged or len(names) != 1:
        return None
    name = names[0]
    if name not in module.lora_A or name in module.lora_variant:  # a variant: DoRA, say
        return None
    maps, dropout = (module.lora_A[name], module.lora_B[name]), module.lora_dropout[name]
    idle = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not (dropout.training and dropout.p))
    if not idle or any(type(m) is not nn.Linear or m.bias is not None for m in maps):
        return None
    for part in (*maps, dropout):  # which are not called
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return None
    return name


def _fits(kernels: Any, values: Values) -> bool:
    rank = 0 if values.u is None else values.u.shape[2]
    return values.w.dtype in SERVED and values.w[0].is_contiguous() and rank <= kernels.MOST_FACTORS


def _is_ours(y: Tensor, x: Tensor, base: nn.Module) -> bool:
    """Whether nobody else sees the base's outputs, so that they may be changed in place."""
    apart = y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    return apart and y.is_contiguous() and not base._forward_hooks
