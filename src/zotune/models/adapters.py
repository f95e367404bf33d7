"""Saved models and PEFT adapters: written with what they were trained on, and put on nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import InputError
from zotune.models.border import reading
from zotune.models.ids import refuse_without_ids
from zotune.models.kinds import kind_of, without_adapter
from zotune.models.partial import some
from zotune.models.quantized import base_dtype, inner_tensors

NAME = "default"  # PEFT's, of an adapter that was given none
BASE = "base_weights.json"  # beside an adapter: some values of each weight that it was trained on
VALUES = 4  # of a weight


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As `from_pretrained` (or PEFT) loads it. An adapter of another kind than causal says so in a config.json of its model, and
    every adapter which base it is for."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = without_adapter(model)
    if base is model:
        return
    dtype = str(base_dtype(base)).removeprefix("torch.")
    known = {"dtype": dtype, "values": {name: _values(p) for name, p in _base_weights(base)}}
    (folder / BASE).write_text(json.dumps(known, allow_nan=False) + "\n", encoding="utf-8")
    if kind_of(model) != "causal":
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        if hasattr(config, "quantization_config"):  # of the base as it was loaded, not of a checkpoint
            del config.quantization_config
        config.save_pretrained(folder)


def put_adapter(model: nn.Module, folder: str, allow_pickle: bool = False) -> Any:
    """The model with the adapter of a folder on it, for inference.

    Raises InputError where there is none that fits: all of its weights have a place, all places weights, and the model's own are
    those that it was trained on, where its folder tells.
    """
    import peft

    path, where = Path(folder).expanduser(), f"--adapter {folder}"
    if not (path / "adapter_config.json").is_file():
        raise InputError(f"{where}: no adapter_config.json in it")
    if not (path / "adapter_model.safetensors").is_file():
        if not (path / "adapter_model.bin").is_file():
            raise InputError(f"{where}: no adapter_model.safetensors in it")
        if not allow_pickle:
            raise InputError(
                f"{where}: no adapter_model.safetensors in it, and a pickled adapter can hold code; "
                "--allow-pickle reads it (tensors alone, by torch's weights_only)"
            )
    _refuse_other_base(model, path, where)
    with reading(where, path, said="does not fit the model: "):
        adapted = peft.PeftModel.from_pretrained(model, str(path)).eval()
        # PEFT only warns of what is missing, and says nothing of what has no place
        held = peft.load_peft_weights(str(path), device="cpu")
        found: Any = peft.set_peft_model_state_dict(adapted, held, adapter_name=NAME)
    if adapted.active_peft_config.is_prompt_learning:
        if adapted.active_peft_config.peft_type != peft.PeftType.PREFIX_TUNING:
            refuse_without_ids(adapted, where, "prefix tuning or LoRA")
        return adapted  # whose one table PEFT takes whole, or not at all
    own = dict(adapted.named_parameters(remove_duplicate=False))
    missing = {name for name in found.missing_keys if NAME in name.split(".")}
    there = {id(param) for name, param in own.items() if name not in missing}  # of tied ones one is saved
    lacks = [name for name in missing if name not in own or id(own[name]) not in there]
    if lacks or found.unexpected_keys:
        told = [f"no weights for {some(lacks)} in it"] * bool(lacks)
        told += [f"no place in the model for its {some(found.unexpected_keys)}"] * bool(found.unexpected_keys)
        raise InputError(f"{where}: does not fit the model: {'; '.join(told)}; {_made_for(path)}")
    return adapted


def unproven(folder: str, name: str) -> str | None:
    """A line on an adapter whose folder does not tell the weights that it was trained on; None where they were compared, or where
    it names the hub's model that it is put on. name: the model's.

    A folder's name says little of what is in it, and mirrors of one model have many names, so another one is told, not refused.
    """
    path = Path(folder).expanduser()
    if (path / BASE).is_file():
        return None
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    at = f" at revision {revision}" if revision else ""
    if base == name and not at and not Path(name).expanduser().exists():
        return None
    made = f"it names {base}{at}" if base else "it names no model"
    return f"--adapter {folder}: whether it was trained on the weights of {name} is not known: {made}, and none of their values"


def refuse_other_tokens(folder: str, tokenizer: Any) -> None:
    """Raises InputError where the adapter was trained with tokens that the model's tokenizer writes as texts, or has otherwise."""
    file = Path(folder).expanduser() / "tokenizer.json"
    if not file.is_file():
        return
    with reading(f"--adapter {folder}", file):
        added = {
            token["id"]: token["content"] for token in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        }
    own = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    if others := [text for i, text in added.items() if own.get(i) != text]:
        raise InputError(
            f"--adapter {folder}: its tokenizer has tokens that the model's has not ({some(others)}): put its tokenizer's files "
            "beside the model's weights"
        )


def _made_for(path: Path) -> str:
    """What to try, by what the adapter says of itself."""
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    kinds = {"SEQ_CLS": "--model-kind classifier, ", "CAUSAL_LM": "--model-kind causal, "}
    base = config.get("base_model_name_or_path")
    kind = kinds.get(str(config.get("task_type")), "")
    return f"it was made for {kind}--model {base}" if base else f"it was made for {kind}a base that it does not name"


def _base_weights(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights under an adapter, or of a model without one, by the model's own names; none that the adapter brings or replaces."""
    for name, param in base.named_parameters():
        parts = name.split(".")
        if NAME in parts or "original_module" in parts or not param.is_floating_point():
            continue
        if len(inner_tensors(param)) == 1 and inner_tensors(param)[0].dtype == param.dtype:
            yield ".".join(part for part in parts if part != "base_layer"), param


@torch.no_grad()
def _values(param: Tensor) -> list[float]:
    """Some elements, evenly spaced."""
    count = min(VALUES, param.numel())
    at = torch.linspace(0, param.numel() - 1, count, dtype=torch.float64).long().to(param.device)
    return [float(v) for v in param.detach()[torch.unravel_index(at, param.shape)].tolist()] if count else []


def _refuse_other_base(model: nn.Module, path: Path, where: str) -> None:
    """Raises InputError where the adapter's folder tells of other weights than the model has. In another dtype they are rounded."""
    if not (path / BASE).is_file():
        return
    with reading(where, path / BASE):
        known = json.loads((path / BASE).read_text(encoding="utf-8"))
        values: dict[str, list[float]] = {name: [float(v) for v in few] for name, few in known["values"].items()}
        dtype = str(known["dtype"])
    for name, param in _base_weights(model):
        if name in values and not _same(values[name], param, exact=f"torch.{dtype}" == str(param.dtype)):
            raise InputError(
                f"{where}: it was trained on other weights than the model's, {name} differs; {_made_for(path)} (or delete its "
                f"{BASE} to put it on this one all the same)"
            )


def _same(values: list[float], param: Tensor, exact: bool) -> bool:
    found = _values(param)
    if exact or len(found) != len(values):
        return found == values
    return all(abs(a - b) <= 2**-7 * abs(b) + 1e-7 for a, b in zip(found, values, strict=True))  # bfloat16's last bit
