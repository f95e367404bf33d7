"""Saved models and PEFT adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from zotune.errors import InputError
from zotune.models.kinds import kind_of, without_adapter


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As `from_pretrained` (or PEFT) loads it. An adapter of another kind than causal says so in a config.json of its model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = without_adapter(model)
    if base is not model and kind_of(model) != "causal":
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        if hasattr(config, "quantization_config"):  # of the base as it was loaded, not of a checkpoint
            del config.quantization_config
        config.save_pretrained(folder)


def put_adapter(model: nn.Module, folder: str, allow_pickle: bool = False) -> Any:
    """The model with the adapter of a folder on it, for inference. Raises InputError where there is none that fits."""
    import peft

    path = Path(folder).expanduser()
    if not (path / "adapter_config.json").is_file():
        raise InputError(f"--adapter {folder}: no adapter_config.json in it")
    if not (path / "adapter_model.safetensors").is_file():
        if not (path / "adapter_model.bin").is_file():
            raise InputError(f"--adapter {folder}: no adapter_model.safetensors in it")
        if not allow_pickle:
            raise InputError(
                f"--adapter {folder}: no adapter_model.safetensors in it, and a pickled adapter can hold code; "
                "--allow-pickle reads it (tensors alone, by torch's weights_only)"
            )
    try:
        return peft.PeftModel.from_pretrained(model, str(path)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--adapter {folder}: does not fit the model ({first})") from error
