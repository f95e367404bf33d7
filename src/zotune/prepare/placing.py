"""Where a run's weights live: all on the device, or on the host and streamed where `--max-gpu-memory` says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from zotune.engines.streamed import plan_of
from zotune.errors import InputError
from zotune.estimates.streaming import RESERVE, said
from zotune.models.loading import pick_device
from zotune.models.quantized import is_quantized
from zotune.options import TrainConfig
from zotune.streaming import GIB, stream

CARDS = {"cuda"}  # devices with a memory of their own
TOKENS_A_GIB = (
    1024  # of one forward, of what the weights leave of the budget: 1 MiB a token, OPT-30B's takes half of it
)


def loads_on(config: TrainConfig) -> TrainConfig:
    """The options that a model is loaded by: on the host where it is to stream. Raises InputError where it cannot."""
    if config.max_gpu_memory is None:
        return config
    said, device = f"--max-gpu-memory {config.max_gpu_memory}", pick_device(config.device)
    if device.type not in CARDS:
        raise InputError(f"{said}: is of a card, and this run is on the {device.type}; leave it out")
    if config.quantize is not None:
        raise InputError(f"{said}: layers of a quantised base do not stream; leave out one of this and --quantize")
    return config.model_copy(update={"device": "cpu"})


@dataclass(frozen=True)
class Placed:
    """tokens: of one forward, at most, that the rest of the budget has room for. line: what streams, and how long that takes."""

    tokens: int
    line: str


def placed(model: nn.Module, config: TrainConfig) -> Placed | None:
    """Let a model that was loaded on the host stream to the device; None where nothing was said and nothing streams."""
    if config.max_gpu_memory is None:
        return None
    if is_quantized(model):
        raise InputError(
            f"--max-gpu-memory {config.max_gpu_memory}: layers of a quantised base do not stream; leave it out"
        )
    budget, device, plan = config.gpu_bytes, pick_device(config.device), plan_of(model)
    slots = plan.slots(budget, RESERVE)
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        if budget < whole:
            torch.cuda.set_per_process_memory_fraction(budget / whole, device)
    stream(model, plan, device, slots)
    tokens = max(1, TOKENS_A_GIB * (budget - plan.stays - slots * plan.room) // GIB)
    writes = any(p.requires_grad for _, _, params in plan.blocks for p in params)
    return Placed(tokens, said(plan, budget, writes))
