"""The parameter groups of a run, which its record counts and a replay makes again."""

from __future__ import annotations

from typing import Any

from torch import nn

from zotune.step.optimizer import trainable
from zotune.trainer.hooks import decayed_names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters. Decay reaches what the Trainer decays: no biases and no norms."""
    named = trainable(model)
    if not weight_decay:
        return [{"params": named}]
    decayed = decayed_names(model)
    groups = [
        {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
