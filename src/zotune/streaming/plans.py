"""What of a model streams, and how many of its blocks a budget has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zotune.errors import InputError
from zotune.streaming.packed import Scales

ALIGNED = 256  # bytes: where a tensor begins in its slot
SLOTS = 3  # one computes, one comes, one goes
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What streams of a model, in bytes. blocks: (name, module, its parameters that stream, and the scales of packed ones).

    room: of a slot, the largest block's. stays: of all else, which is on the device for good.
    """

    blocks: list[tuple[str, nn.Module, list[Any]]]
    room: int
    stays: int

    @property
    def streams(self) -> int:
        return sum(bytes_of(p) for _, _, params in self.blocks for p in params)

    @property
    def all(self) -> int:
        return self.streams + self.stays

    def slots(self, budget: int, reserve: int) -> int:
        """How many slots a budget of so many bytes has room for, beside a reserve for activations. Raises InputError."""
        count = min(SLOTS, len(self.blocks), (budget - self.stays - reserve) // self.room)
        if count < min(2, len(self.blocks)):
            least = self.stays + 2 * self.room + reserve
            raise InputError(
                f"--max-gpu-memory {budget / GIB:.2f}GiB: too little: two blocks take {2 * self.room / GIB:.2f} GiB, what stays "
                f"on the card (embedding, head, vectors) {self.stays / GIB:.2f}, activations {reserve / GIB:.2f}; give "
                f"{math.ceil(least / GIB * 100) / 100:.2f}GiB at least"
            )
        return int(count)


def plan(model: nn.Module, stays: Callable[[nn.Parameter], bool]) -> Plan:
    """The model's repeated blocks: the members of its `nn.ModuleList`s, the outermost, that hold most of its parameters.

    stays: which parameters of a block do not stream: small ones, which engines draw for a whole forward at once. A parameter that
    stands outside the blocks too, or in two of them (tied), stays. Raises InputError where nothing streams.
    """
    inside: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other, _ in inside):
            inside += [(f"{name}.{i}", one) for i, one in enumerate(module)]
    times: dict[int, int] = {}
    for _, param in _all(model):
        times[id(param)] = times.get(id(param), 0) + 1
    blocks, size = [], 0
    for name, module in inside:
        params: list[Any] = [p for _, p in _all(module) if times[id(p)] == 1 and p.is_contiguous() and not stays(p)]
        if params:
            size += sum(map(bytes_of, params))
            scales = [Scales(p) for p in params if getattr(p, "quant_state", None) is not None]
            blocks.append((name, module, params + scales))
    if not blocks:
        raise InputError(
            f"--max-gpu-memory: {type(model).__name__} has no repeated layers (members of an nn.ModuleList with matrices) to "
            "stream; leave the option out"
        )
    room = max(sum(aligned(bytes_of(p)) for p in params) for _, _, params in blocks)
    kept = sum(map(bytes_of, model.parameters())) + sum(map(bytes_of, model.buffers())) - size
    return Plan(blocks, room, kept)


def _all(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def bytes_of(tensor: Tensor | Scales) -> int:
    return tensor.numel() * tensor.element_size()


def aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
