"""What a run's weights and machine are known by."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from zotune.models.quantized import inner_tensors


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and persistent buffers, in order of their names."""
    return _digest(model.state_dict().items())


def _digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for inner in inner_tensors(tensor.detach()):
            flat = inner.contiguous().view(-1).view(torch.uint8)
            for first in range(0, flat.numel(), 1 << 26):
                digest.update(flat[first : first + (1 << 26)].cpu().numpy().data)
    return digest.hexdigest()


def start(model: nn.Module) -> str:
    """`fingerprint` of what trains, of which a scheme may have made the first values."""
    held = model.state_dict()  # of weights that stream, what is on the host
    return _digest((n, held.get(n, p)) for n, p in model.named_parameters() if p.requires_grad)


def machine(device: torch.device) -> dict[str, str]:
    """What the bits of a run may depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name} | {package: metadata.version(package) for package in ("zotune", "torch")}


@cache
def _processor() -> str:
    """The processor's name, and the instructions that torch's kernels and libraries choose by it."""
    name = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text(errors="replace")
        name = next(
            (line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), name
        )
    except OSError:
        pass
    return f"cpu {name} {torch.backends.cpu.get_cpu_capability()}"
