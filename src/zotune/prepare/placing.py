"""Where a run's weights live: all on the device, or on the host and streamed where `--max-gpu-memory` says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from zotune.engines.streamed import plan_of
from zotune.errors import InputError
from zotune.estimates.memory import readable
from zotune.estimates.streaming import RESERVE, said
from zotune.models.loading import pick_device
from zotune.models.quantized import inner_tensors
from zotune.options import TrainConfig
from zotune.options.commands import size_of
from zotune.streaming import GIB, stream

CARDS = {"cuda"}  # devices with a memory of their own
TOKENS_A_GIB = (
    1024  # of one forward, of what the weights leave of the budget: 1 MiB a token, OPT-30B's takes half of it
)


def loads_on(config: TrainConfig) -> TrainConfig:
    """The options that a model is loaded by: on the host where it is to stream. Raises InputError where it cannot."""
    if config.max_gpu_memory is None:
        if config.max_host_memory is not None:
            raise InputError(
                f"--max-host-memory {config.max_host_memory}: is of layers that stream; give --max-gpu-memory too"
            )
        return config
    said, device = f"--max-gpu-memory {config.max_gpu_memory}", pick_device(config.device)
    if device.type not in CARDS:
        raise InputError(f"{said}: is of a card, and this run is on the {device.type}; leave it out")
    if config.quantize == "int8":
        raise InputError(f"{said}: layers in int8 do not stream; use --quantize nf4, or leave one of the two out")
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
    if any(len(inner_tensors(p)) > 1 for p in model.parameters()):
        raise InputError(
            f"--max-gpu-memory {config.max_gpu_memory}: weights of several tensors each (torchao's) do not stream; leave it out"
        )
    budget, device, plan = config.gpu_bytes, pick_device(config.device), plan_of(model)
    slots = plan.slots(budget, RESERVE)
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        if budget < whole:
            torch.cuda.set_per_process_memory_fraction(budget / whole, device)
    weights = stream(model, plan, device, slots, None, size_of(config.max_host_memory or "") or None)
    tokens = max(1, TOKENS_A_GIB * (budget - plan.stays - slots * plan.room) // GIB)
    writes = any(p.requires_grad for _, _, params in plan.blocks for p in params)
    line = said(plan, budget, writes)
    if staying := weights.in_files:
        size = readable(sum(block.bytes for block in staying))
        line += f"; {len(staying)} of {len(weights.blocks)} layers ({size}) stay in their files and are read at each forward"
    return Placed(tokens, line)
