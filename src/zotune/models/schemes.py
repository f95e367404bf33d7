"""Which parameters train: all of them, or an adapter's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from zotune.errors import InputError, nearest

SMALL_MODEL = 500_000_000  # parameters; smaller ones want larger steps


@dataclass(frozen=True)
class Scheme:
    """What a scheme trains, how it prepares a model, and where to start with lr and eps (MeZO's ranges)."""

    trains: str
    prepare: Callable[[nn.Module], nn.Module]
    lr: float
    small_lr: float
    eps: float

    def default_lr(self, model: nn.Module) -> float:
        return self.small_lr if sum(p.numel() for p in model.parameters()) < SMALL_MODEL else self.lr


def _full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: nn.Module) -> nn.Module:
    """r 8, α 16, no dropout, on q_proj and v_proj (elsewhere the modules that PEFT names for the family), B = 0."""
    import peft

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = ["q_proj", "v_proj"] if {"q_proj", "v_proj"} <= names else None
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise InputError(
            f"--scheme lora: PEFT names no modules of {kind!r} to adapt ({str(error).splitlines()[0]})"
        ) from None


SCHEMES = {
    "full": Scheme("all parameters", _full, lr=1e-6, small_lr=1e-5, eps=1e-3),
    "lora": Scheme("LoRA r 8, α 16 on q_proj and v_proj", _lora, lr=1e-4, small_lr=3e-4, eps=1e-2),
}


def get_scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name!r}; {nearest(name, SCHEMES)}")
    return SCHEMES[name]


def trainable_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
