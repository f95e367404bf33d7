"""Directional derivatives by forward-mode differentiation: L(θ) and ∇L(θ)ᵀz from one forward.

As in `sequential`, every read of a trainable parameter is followed; here the function that reads it gets a dual number whose
tangent is z, drawn into scratch for the call. So no z exists whole but for one parameter, and no gradient or activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.directions import Displacement, HeldDisplacement
from zotune.engines.reads import leaves
from zotune.engines.sequential import PerturbedReads, SequentialEngine
from zotune.errors import InputError


class ForwardModeEngine(SequentialEngine):
    """L(θ) and ∇L(θ)ᵀ(displacement) of any closure whose functions have forward-mode derivatives.

    Fused attention has none, so attention runs by torch's plain formula, which has; its scores (heads × tokens²) are made whole.
    """

    name = "forward-mode"

    def derivative(
        self, closure: Callable[[], Tensor], along: Displacement | HeldDisplacement
    ) -> tuple[Tensor, Tensor]:
        """(L, ∇Lᵀ(displacement)), 0-d. Raises InputError where a function of the model has no forward-mode derivative."""
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _DualReads(self, along):
            try:
                loss = self._run(closure)
            except NotImplementedError as error:
                first = str(error).splitlines()[0]
                raise InputError(
                    f"method forward-grad: {first}; load the model with attn_implementation='eager', or use zo-sgd"
                ) from error
            if not isinstance(loss, Tensor):
                raise InputError("method forward-grad: the closure must return a tensor, computed from the weights")
            loss, tangent = forward_ad.unpack_dual(loss.double().mean())
            return loss, torch.zeros_like(loss) if tangent is None else tangent


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """By its formula, in float32. The fused one's derivative overflows in float16 on a CPU, and is float32 itself on CUDA."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input.float()
    centred = centred - centred.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    out = out if weight is None else out * weight.float()
    return (out if bias is None else out + bias.float()).to(input.dtype)


class _DualReads(PerturbedReads):
    def __init__(self, engine: ForwardModeEngine, along: Displacement | HeldDisplacement) -> None:
        super().__init__(engine, along)
        self.read = set(engine.directions.slots)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.layer_norm:
            input = args[0] if args else (kwargs or {})["input"]
            func = _layer_norm if input.dtype in (torch.bfloat16, torch.float16) else func
        return super().__torch_function__(func, types, args, kwargs)

    def _dual(self, param: Any, tangent: Tensor) -> Tensor:
        flat = tangent.view(-1)
        for first, tile in self.engine.directions.gradient_tiles(param, self.at, 1 << 20):
            flat[first : first + tile.numel()] = tile.to(tangent.dtype)
        return forward_ad.make_dual(param.data, tangent)

    def _call_with_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        duals: dict[int, Tensor] = {}

        def substitute(arg: Any) -> Any:
            if id(arg) in self.read:
                if id(arg) not in duals:
                    # fresh memory: the function's result may hold on to the tangent, as a transpose does
                    duals[id(arg)] = self._dual(arg, torch.empty(arg.shape, dtype=arg.dtype, device=arg.device))
                return duals[id(arg)]
            return arg

        return func(*(leaves(a, substitute) for a in args), **{k: leaves(v, substitute) for k, v in kwargs.items()})

    def _tiled_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        return None

    def _embedding_rows(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return None
