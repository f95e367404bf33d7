"""Packed weights: what they stand for, and those of 4 bits as a block has them.

bitsandbytes' packed bytes are the parameter, their scales stand beside it; torchao's weights are tensors of a kind of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Scales:
    """The scales of a packed weight, one for each block of its elements, as one more tensor of the weight's block.

    `data` is what its products read: `quant_state.absmax`.
    """

    requires_grad = False

    def __init__(self, weight: Any) -> None:
        self.state = weight.quant_state

    @property
    def data(self) -> Tensor:
        return self.state.absmax

    @data.setter
    def data(self, value: Tensor) -> None:
        self.state.absmax = value

    def numel(self) -> int:
        return self.data.numel()

    def element_size(self) -> int:
        return self.data.element_size()


def to_device(param: nn.Parameter, device: torch.device) -> None:
    """A parameter that does not stream, and whatever a packed one is read by."""
    if (state := getattr(param, "quant_state", None)) is not None:
        state.to(device)
    if not hasattr(param, "streamed"):
        param.data = param.data.to(device)


def is_packed(param: nn.Parameter) -> bool:
    """Whether it is one of torchao's: several tensors behind the face of one."""
    return type(param.data).__module__.startswith("torchao.")


def unpacked(param: nn.Parameter) -> Tensor:
    """The values that a weight of torchao or bitsandbytes stands for; any other as it is."""
    if (state := getattr(param, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(param.data, state)
    return param.dequantize() if is_packed(param) else param
