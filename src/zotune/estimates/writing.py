"""What writing answers asks of a machine: the memory of keys and values."""

from __future__ import annotations

from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cache_bytes(config: Any, rows: int, tokens: int, dtype: str) -> int:
    """Of the keys and values of so many rows of so many tokens: 2·layers·heads·width·bytes each. A layer with a window of its own
    needs less; this is the most."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = (getattr(text, name, 0) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
    heads_kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return int(2 * layers * heads_kept * width * BYTES[dtype] * rows * tokens)
