"""Attention that hides no NaN.

On a CPU torch's fused attention takes a query that is no number for one that may see nothing, and gives 0: a forward whose numbers
have left the range goes on to a loss that looks like any other. Here such a query's output is NaN, as its formula has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def attended(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a torch function gives; a sum over the queries tells whether there is anything to mend."""
    result = func(*args, **kwargs)
    if func is F.scaled_dot_product_attention:
        query: Tensor = args[0] if args else kwargs["query"]
        if query.device.type == "cpu" and not math.isfinite(float(query.detach().sum(dtype=torch.float32))):
            result = result + (0 * query.detach().sum(-1, keepdim=True, dtype=torch.float32)).to(result.dtype)
    return result


class _Attended(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return attended(func, args, kwargs or {})


def hiding_nothing(params: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """While a model of these parameters is evaluated, or its gradient taken. Where losses are probed the engines see to it."""
    on_cpu = any(param.device.type == "cpu" for param in params)
    return _Attended() if on_cpu else nullcontext()
