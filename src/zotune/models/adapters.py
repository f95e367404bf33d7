"""Saved PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from zotune.errors import InputError


def put_adapter(model: nn.Module, folder: str) -> Any:
    """The model with the adapter of a folder on it, for inference. Raises InputError where there is none that fits."""
    import peft

    path = Path(folder).expanduser()
    if not (path / "adapter_config.json").is_file():
        raise InputError(f"--adapter {folder}: no adapter_config.json in it")
    if not (path / "adapter_model.safetensors").is_file():
        raise InputError(f"--adapter {folder}: no adapter_model.safetensors in it; pickled adapters are not read")
    try:
        return peft.PeftModel.from_pretrained(model, str(path)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--adapter {folder}: does not fit the model ({first})") from error
