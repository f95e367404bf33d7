"""What a step on rewards asks of a machine: the memory of keys and values, and the time that answers take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zotune.estimates.estimate import estimate
from zotune.estimates.rates import Rates, forward_seconds

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cache_bytes(config: Any, rows: int, tokens: int, dtype: str) -> int:
    """Of the keys and values of so many rows of so many tokens: 2·layers·heads·width·bytes each. A layer with a window of its own
    needs less; this is the most."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = (getattr(text, name, 0) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
    heads_kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return int(2 * layers * heads_kept * width * BYTES[dtype] * rows * tokens)


@dataclass(frozen=True)
class Writing:
    """Of a step: bytes of weights, keys and values, the peak of a forward besides; seconds at most, where no answer ends early."""

    weights: int
    cache: int
    peak: int
    answers: int
    slots: int
    step_seconds: float


def writing_cost(
    config: Any,
    *,
    members: int,
    prompts: int,
    seq_len: int,
    new_tokens: int,
    slots: int,
    scheme: str,
    dtype: str,
    rates: Rates,
) -> Writing:
    """By a roofline: the answers in turn in so many slots, their prompts read by a forward over all of them, then a forward of a
    token each, which reads weights, keys and values once. rates: the device's. Raises InputError.
    """
    answers = members * prompts
    slots = min(slots, answers)
    common: dict[str, Any] = {"scheme": scheme, "dtype": dtype, "rates": rates, "engine": "sequential"}
    prompt = estimate(config, batch_size=slots, seq_len=seq_len, **common)
    token = estimate(config, batch_size=slots, seq_len=1, **common)
    cache = cache_bytes(config, slots, seq_len + new_tokens, dtype)
    read = max(token.flops / rates.flops, (token.weights + cache / 2) / rates.bandwidth)
    each = read + token.calls * (rates.call if rates.node is None else rates.node)  # one graph a token on a card
    rounds = -(-answers // slots)
    seconds = rounds * (forward_seconds(prompt, rates) + new_tokens * each)
    return Writing(prompt.weights, cache, prompt.peak + cache, answers, slots, seconds)
