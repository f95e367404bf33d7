"""Bytes, operations and FLOPs of what runs on the meta device, while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from zotune.directions import Directions
from zotune.engines.scratch import SMALL_BYTES, Scratch


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make, until they are freed; the model's own are not counted.

    Rounded to 512, as CUDA's allocator does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.now = self.peak = self.written = self.calls = 0
        self._ignore = False
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A model asks for a value: whether a batch is plain (not packed, not padded). It is.
            return args[0].dtype == torch.bool
        self.calls += 1
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._own:
            return
        if self._ignore:
            self._own.add(key)
            weakref.finalize(storage, self._own.discard, key)
            return
        size = -(-storage.nbytes() // 512) * 512
        self.now += size
        self.written += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._freed, key, size)

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """What is made inside is never counted."""
        self._ignore = True
        yield
        self._ignore = False

    def _freed(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


class Still(Directions):
    """Directions that are drawn nowhere."""

    def displaced(self, param: Any, by: Any, out: Tensor) -> Tensor:
        return out

    def displaced_span(self, param: Any, first: int, last: int, by: Any, out: Tensor) -> Tensor:
        return out

    def displaced_rows(self, param: Any, rows_K: Tensor, by: Any, out: Tensor, update: Any = None) -> Tensor:
        return out

    def _add(self, *args: Any, **kwargs: Any) -> None:
        pass


class CountedScratch(Scratch):
    """A pool of which only the size is wanted: the most bytes in use at one time, which the real one keeps."""

    def __init__(self, live: Allocations) -> None:
        super().__init__()
        self.live, self.most, self._sizes = live, 0, dict[int, int]()

    def take(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if size < SMALL_BYTES:
            return super().take(like)
        with self.live.ignored():
            taken = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._sizes[id(taken)] = size
        self.most = max(self.most, sum(self._sizes.values()))
        return taken

    def give(self, tensor: Tensor) -> None:
        self._sizes.pop(id(tensor), None)

    forget = give


def forward_cost(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, int]:
    """FLOPs and operations of one forward."""
    # On its own: the counter's hooks keep tensors alive, which would be counted.
    with (
        torch.no_grad(),
        fused_attention() as attention,
        FlopCounterMode(display=False) as products,
        Allocations(model) as made,
    ):
        loss()
    return products.get_total_flops() + sum(attention), made.calls


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def fused_attention() -> Iterator[list[float]]:
    """Scaled dot-product attention as the fused kernels do it: no scores are kept. Gives the FLOPs of each call.

    A mode would do but for the recomputation of a checkpoint, which runs outside of all modes.
    """
    flops: list[float] = []
    real = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flops.append(4 * query.numel() * key.shape[-2] / 2)  # causal
        return _Fused.apply(query, key, value)

    F.scaled_dot_product_attention = attend
    try:
        yield flops
    finally:
        F.scaled_dot_product_attention = real
