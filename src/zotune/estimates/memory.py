"""What memory a run took, and what back-propagation would have taken."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zotune.models.quantized import inner_tensors

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 30


def reset_peak(device: torch.device) -> None:
    """Start the peak anew. On the CPU only Linux can; elsewhere the peak is the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Bytes at the peak: on CUDA what torch allocated, on the CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed() -> bool:
    """From now on this process keeps the memory that it frees, up to 1 GiB a block, for who asks next. Whether it does.

    A step frees and asks for the same activations again and again. glibc hands large blocks back to the system each time and
    takes them again page by page, which is a tenth of a step on a CPU (docs/performance.md). Elsewhere nothing happens. It
    belongs to the whole process, so only programs call it: `zotune train` does.
    """
    return all(set_malloc(option, KEPT_BYTES) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def set_malloc(option: int, value: int) -> bool:
    """glibc's `mallopt`; whether there is one, and took it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value) == 1)
    except (OSError, AttributeError):  # another C library
        return False


@dataclass(frozen=True)
class AdamCost:
    """What back-propagation with Adam keeps beyond the weights, in bytes, training the same parameters."""

    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.gradients + self.moments + self.activations


def adam_cost(model: nn.Module, row_loss: Callable[[], Tensor], rows: int) -> AdamCost:
    """Gradients as wide as the weights, two float32 moments, and the activations that autograd keeps.

    row_loss: the loss of one row. Its forward runs once with gradients on and what autograd saves is counted, weights
    left out; a batch of `rows` keeps as many times that. Nothing is back-propagated.
    """
    weights = {t.untyped_storage().data_ptr() for p in model.parameters() for t in inner_tensors(p)}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        for inner in inner_tensors(tensor):
            storage = inner.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = row_loss()
    del loss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return AdamCost(gradients, 8 * sum(p.numel() for p in trained), rows * sum(saved.values()))


def readable(size: int) -> str:
    """
    >>> readable(1_610_612_736)
    '1.50 GiB'
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
