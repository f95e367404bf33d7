"""A model and what trains of it on the meta device, from its config alone: tensors that have no storage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.errors import InputError
from zotune.models.border import reading
from zotune.models.kinds import fits
from zotune.models.schemes import PREFIX_TOKENS, PROMPT_TOKENS, SCHEMES

VIRTUAL_TOKENS = {"prefix": PREFIX_TOKENS, "prompt": PROMPT_TOKENS}


def model_config(source: str | Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """The config of a hub name, a folder, a config.json, or `{random: {model_type, …}}`. Raises InputError."""
    import transformers

    if not isinstance(source, str):
        given = dict(source["random"])
        with reading("random model"):
            return transformers.AutoConfig.for_model(**given)
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".json"
    if looks_local and not path.exists():
        raise InputError(f"--model {source}: no such file or folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model {source}: no config.json in it")
    with reading(f"--model {source}", path if path.exists() else source):
        config = transformers.AutoConfig.from_pretrained(
            str(path) if path.exists() else source, trust_remote_code=trust_remote_code
        )
    if not fits(config, "causal"):
        named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise InputError(f"--model {source}: a {named} is no causal language model, and no others are estimated")
    return config


def without_dropout(config: Any) -> None:
    """Set a config's dropouts to 0, and no key-value cache."""
    for key, value in list(vars(config).items()):
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, without dropout: methods without back-propagation use none, and it must not differ here."""
    import transformers

    without_dropout(config)
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError:
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None):
            raise
        kind = getattr(config, "model_type", type(config).__name__)
        raise InputError(f"{kind} is no causal model, and no others are estimated") from None


def with_scheme(model: nn.Module, scheme: str, tangents: bool = False) -> tuple[nn.Module, int]:
    """The meta model with the scheme's parameters on it, and the tokens that it adds to each row.

    Prefix and prompt start from activations or embeddings, which a model without values has not: their sizes stand in.
    tangents: whether a forward will carry derivatives.
    """
    if scheme not in VIRTUAL_TOKENS:
        return SCHEMES[scheme].prepare(model), 0
    model.requires_grad_(False)
    config: Any = getattr(model.config, "text_config", model.config)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    layers, width = config.num_hidden_layers, config.hidden_size
    if scheme == "prefix":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or width // config.num_attention_heads
        count = 2 * layers * VIRTUAL_TOKENS["prefix"] * heads * size
    else:
        count = VIRTUAL_TOKENS["prompt"] * width
    virtual = nn.Parameter(torch.empty(count, dtype=head.weight.dtype, device="meta"))  # type: ignore[arg-type]
    model.register_parameter("virtual_tokens", virtual)
    # What follows the virtual tokens depends on them: autograd keeps its activations, forward mode gives each a tangent.
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    table.register_forward_hook(
        lambda module, args, out: out + 0 * virtual[0] if tangents or torch.is_grad_enabled() else out
    )
    return model, VIRTUAL_TOKENS["prompt"] if scheme == "prompt" else 0
