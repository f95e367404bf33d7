"""A causal model and its tokenizer from the hub, a folder or a GGUF file, whole and in one dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.errors import InputError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; try --device cpu")
    return torch.device(name)


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The pretrained causal model, in eval mode, on the device.

    name: a hub name or a local folder. dtype None keeps the checkpoint's own (float32 for GGUF). Weights are read from
    safetensors or GGUF, never unpickled. Raises InputError where the model cannot be had.
    """
    import transformers

    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _said_as_one_line(name, gguf_file):
        if gguf_file is not None:
            model = _from_gguf(name, gguf_file, kwargs)
            model = model.to(DTYPES[dtype]) if dtype else model
        else:
            kwargs |= {"dtype": DTYPES[dtype] if dtype else "auto", "use_safetensors": True}
            model = transformers.AutoModelForCausalLM.from_pretrained(name, **kwargs)
    return model.to(device).eval()


def load_tokenizer(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    import transformers

    with _said_as_one_line(name, gguf_file):
        extra = {"gguf_file": gguf_file} if gguf_file else {}
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> bool:
    """Copy a saved model's tensors into the model's own, one at a time. False where the folder holds no whole model."""
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for file in files:
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118  # not a dict
                own[name].copy_(saved.get_tensor(name))
    return bool(files)


def length_limit(model: nn.Module) -> int | None:
    """How many tokens the model takes, from its config; None where the config does not say."""
    config = getattr(model.config, "text_config", model.config)
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        limit = getattr(config, field, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _from_gguf(name: str, gguf_file: str, kwargs: dict[str, Any]) -> nn.Module:
    """transformers takes a model from a GGUF file for a quantised one and refuses to cast it: build it once more."""
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file, dtype=torch.float32, **kwargs)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


@contextlib.contextmanager
def _said_as_one_line(name: str, gguf_file: str | None) -> Iterator[None]:
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise InputError(f"--model {name}: no such folder" + (f"; {nearest(path.name, near)}" if near else ""))
    if gguf_file and path.is_dir() and not (path / gguf_file).is_file():
        here = sorted(p.name for p in path.glob("*.gguf"))
        raise InputError(f"--gguf-file {gguf_file}: not in {name} (it has {', '.join(here) or 'no .gguf file'})")
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"--model {name}: {lines[0].strip()}") from error
