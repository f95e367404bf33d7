"""What a worker tells the others of a step: one message of a fixed length.

    ======  =======  ==================================================================================
    offset  type     message
    ======  =======  ==================================================================================
    0       u8       how its part went: DONE, FAILED, DREW
    1       u8       signal by which it was asked to stop, or 0
    2       u8       bytes of one of its losses, 4 or 8; 0: it has evaluated none
    4       i32      piece at which its engine stepped aside, or −1
    8       u32      check sum of its weights, where this step compares them, or 0
    12      u32      check sum of its batches, likewise
    16               losses
    ======  =======  ==================================================================================

Losses are the exact sums over its rows at each place (see `zotune.step.pieces`), 16 bytes a place; or, where each row has its own
directions, those of its rows as they are, 4 bytes a row and place (8 where losses are float64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_HEAD = struct.Struct("<BBBxiII")
HEAD_BYTES, PLACE_BYTES, ROW_BYTES = (
    _HEAD.size,
    16,
    4,
)  # of a message; of a place that rows share; of a row's loss, in float32
DONE, FAILED, DREW = range(3)
AT_ONCE = 1 << 24  # elements of a weight that a check sum on a device widens


class Message(NamedTuple):
    status: int = DONE
    signal: int = 0
    width: int = 0
    aside: int = -1
    weights: int = 0
    batches: int = 0
    losses: bytes = b""

    def encode(self, size: int) -> bytes:
        """size: bytes of the losses' field."""
        return _HEAD.pack(*self[:-1]) + self.losses.ljust(size, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Message:
        return cls._make((*_HEAD.unpack_from(data), data[_HEAD.size :]))


def weights_sum(params: Iterable[Tensor]) -> int:
    """32 bits over the bytes of all parameters, in order; another on a CPU than on a card."""
    crc = 1
    for param in params:
        flat = param.detach().contiguous().view(-1)
        if flat.is_cuda:
            bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
            sums = []
            for first in range(0, len(bits), AT_ONCE):
                some = bits[first : first + AT_ONCE].long()
                place = torch.arange(len(some), device=some.device) * 2 + 1  # odd, so that no bit is lost
                sums.append((some * place).sum())
            data = torch.stack(sums).cpu().numpy().tobytes() if sums else b""
            crc = zlib.crc32(data, crc)
        elif flat.numel():
            crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


def batches_sum(batches: Sequence[Any]) -> int:
    """32 bits over the tensors of the batches, which have to be the same for all workers."""
    crc = 1
    for batch in batches:
        for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else ():
            if isinstance(value, Tensor):
                shape = f"{name} {value.dtype} {tuple(value.shape)}"
                data = (
                    value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data if value.numel() else b""
                )
                crc = zlib.crc32(data, zlib.crc32(shape.encode(), crc))
    return crc
