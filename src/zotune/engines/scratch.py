"""Reused memory for perturbed copies."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this a fresh tensor costs less than looking for a used one.
SMALL_BYTES = 1 << 16


class Scratch:
    """A pool of flat buffers on any devices; in steady state as many as are in use at one time.

    `take` gives a tensor like the one named; `give` returns its memory. A tensor that is taken and never given
    back is freed like any other once nothing refers to it, so a view of it that outlives its use stays valid.
    keeps: nothing that was once given back is freed, for CUDA graphs, which go on writing where they did when captured.
    """

    def __init__(self, keeps: bool = False) -> None:
        self._keeps = keeps
        self._free: list[Tensor] = []  # 1-D uint8
        self._taken: dict[int, tuple[Tensor, bool]] = {}  # data_ptr → buffer, and whether it was given back before
        self._kept: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if size < SMALL_BYTES:
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        mine = [i for i, buffer in enumerate(self._free) if buffer.device == like.device]
        fitting = [i for i in mine if self._free[i].numel() >= size]
        if fitting:
            buffer = self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        else:
            if mine and not self._keeps:  # grow by replacing: sizes seen on the way to the largest are not kept
                self._free.pop(max(mine, key=lambda i: self._free[i].numel()))
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        self._taken[buffer.data_ptr()] = buffer, bool(fitting)
        return buffer[:size].view(like.dtype).view(like.shape)

    def give(self, tensor: Tensor) -> None:
        buffer, _ = self._taken.pop(tensor.data_ptr(), (None, False))
        if buffer is not None:
            self._free.append(buffer)

    def forget(self, tensor: Tensor) -> None:
        """The tensor's memory now belongs to whatever still refers to it."""
        buffer, again = self._taken.pop(tensor.data_ptr(), (None, False))
        if buffer is not None and again and self._keeps:
            self._kept.append(buffer)

    def release(self) -> None:
        self._free.clear()
        self._taken.clear()
        self._kept.clear()
