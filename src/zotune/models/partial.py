"""What a checkpoint holds against what its model has: one that loads in part computes something, but not what it was trained to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zotune.errors import InputError
from zotune.models.kinds import auto_class, names_classifier, without_adapter

SHOWN = 2  # names in a message


def some(names: Iterable[str]) -> str:
    """The first of many names, and how many more there are."""
    every = sorted(names)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def refuse_partial(model: nn.Module, name: str, missing: set[str], unexpected: set[str]) -> None:
    """Raises InputError where a backbone was not loaded whole, or where the checkpoint has more of one than the model.

    missing: parameters of the model that the checkpoint lacks; unexpected: tensors of the checkpoint that fit nowhere. A head may
    be missing here, and so may what language models of the family do without (a pooler).
    """
    made = type(model).__name__
    if lacks := missing & _backbone(model, missing):
        there = f"it holds {some(unexpected)}, which fit nowhere" if unexpected else "it holds nothing in their place"
        raise InputError(
            f"--model {name}: loads in part: its checkpoint has no weights for {some(lacks)} of a {made}, {there}; name the "
            "checkpoint of this config.json, or mend the names of its tensors"
        )
    if more := _more(model, unexpected):
        raise InputError(
            f"--model {name}: loads in part: a {made} of its config.json has no place for {some(more)} in its checkpoint; name "
            "the config.json of this checkpoint"
        )


def _backbone(model: nn.Module, missing: set[str]) -> set[str]:
    """Those of the missing parameters that a trained model of the family has, with whatever head."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = {name for name in missing if name.startswith(f"{prefix}.")}
    if not inside:
        return set()
    config: Any = model.config
    known: set[str] = set()
    for auto in map(auto_class, ("causal", "masked")):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                known |= set(auto.from_config(config).state_dict())
    if known:
        return inside & known
    return {name for name in inside if re.search(r"\.\d+\.|embed", name)}  # layers, look-ups: what no head has


def _more(model: nn.Module, unexpected: set[str]) -> set[str]:
    """Tensors of further layers like those that the model has, and biases of maps that it has without."""
    general = {_general(name) for name in model.state_dict()}
    modules = dict(model.named_modules())
    layers = {name for name in unexpected if _general(name) in general and re.search(r"\.\d+\.", name)}
    others = heads_of_others(model)
    weights = {name: f"{name.removesuffix('.bias')}.weight" for name in unexpected if name.endswith(".bias")}
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
    return layers | {name for name, weight in weights.items() if weight in linear - others}


def _general(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def heads_of_others(model: nn.Module) -> set[str]:
    """Parameters of a classifier's head that the checkpoint trained for another purpose: a token classifier's fits by name."""
    config: Any = model.config
    if names_classifier(config) or not getattr(config, "architectures", None):
        return set()
    prefix = str(getattr(model, "base_model_prefix", ""))
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")}


def untrained(model: nn.Module) -> set[str]:
    """Parameters that nobody has trained: the checkpoint lacks them, and so does the adapter on it."""
    base = without_adapter(model)
    fresh: set[str] = getattr(base, "fresh_parameters", set())
    saved = [name for name, module in base.named_modules() if hasattr(module, "modules_to_save")]
    return {name for name in fresh if not any(name.startswith(f"{place}.") for place in saved)}


def refuse_untrained(model: nn.Module, where: str) -> None:
    """Raises InputError where a head is as it was drawn. where: whose it is, `--model NAME`."""
    if fresh := untrained(model):
        raise InputError(
            f"{where}: its head was never trained: there are no weights for {some(fresh)}; train one with `zotune train`, or name "
            "a checkpoint, or an --adapter, that has one"
        )
