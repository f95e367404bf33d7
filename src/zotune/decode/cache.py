"""Keys and values of a fixed set of slots, each of which is at a token of its own.

transformers' static cache has one length for all rows. Here the key of a slot's token t is in column t, whatever the others are at.
Columns up to an answer's last are allotted once; those behind a slot's token hold what nobody looks at.
"""

# S slots, n of them, H heads, L columns, T tokens of a prompt, D width of a head.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer


class Slots:
    """Which slots a forward is of, and where they are; what all layers of a cache look at.

    reading: of a prefill the slots (n,) int64 that read their prompts; None: each slot writes its next token. at_S: (S,) int64, the
    column of that token. columns: how many of them a forward sees, a number of the host's.
    """

    def __init__(self, slots: int, columns: int, device: torch.device) -> None:
        self.reading: Tensor | None = None
        self.at_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.all_S = torch.arange(slots, device=device)
        self.room = self.columns = columns

    def __len__(self) -> int:
        return len(self.at_S)


class SlotLayer(CacheLayerMixin):
    """One layer's keys (S, H, L, D), and its values."""

    is_compileable = True  # so that models make the mask of a step, and no shortcut that looks at the values of one
    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room_for(states: Tensor) -> Tensor:
            return states.new_zeros(len(self.slots), states.shape[1], self.slots.room, states.shape[3])

        self.keys, self.values = room_for(key_states), room_for(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values that a forward's tokens attend to: of a prefill their own, else all of the slot's."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.slots
        assert self.keys is not None
        assert self.values is not None
        if slots.reading is not None:
            tokens = key_states.shape[2]
            self.keys[slots.reading, :, :tokens] = key_states
            self.values[slots.reading, :, :tokens] = value_states
            return key_states, value_states
        self.keys[slots.all_S, :, slots.at_S] = key_states[:, :, 0]
        self.values[slots.all_S, :, slots.at_S] = value_states[:, :, 0]
        return self.keys[:, :, : slots.columns], self.values[:, :, : slots.columns]

    def take(self, other: SlotLayer, slots_n: Tensor) -> None:
        """The first slots' keys and values ← those of another's slots."""
        if other.keys is None or other.values is None:
            return
        if not self.is_initialized:
            self.lazy_initialization(other.keys, other.values)
        assert self.keys is not None
        assert self.values is not None
        columns = min(self.slots.room, other.slots.room)
        self.keys[: len(slots_n), :, :columns] = other.keys[slots_n, :, :columns]
        self.values[: len(slots_n), :, :columns] = other.values[slots_n, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.slots.reading is not None else self.slots.columns), 0

    def get_seq_length(self) -> int:
        """Before this forward: a step's token counts as the last column, so that a mask (S, columns) alone says what it sees."""
        return 0 if self.slots.reading is not None else self.slots.columns - 1

    def get_max_length(self) -> int:
        return self.slots.room


class SlotCache(Cache):
    """What a model is given as `past_key_values`. layers: of the model."""

    def __init__(self, layers: int, slots: Slots) -> None:
        super().__init__(layers=[SlotLayer(slots) for _ in range(layers)])

    def take(self, other: SlotCache, slots_n: Tensor) -> None:
        """The first slots' keys and values ← those of another's slots."""
        for mine, layer in zip(self.layers, other.layers, strict=True):
            assert isinstance(mine, SlotLayer)
            assert isinstance(layer, SlotLayer)
            mine.take(layer, slots_n)


class Windows:
    """What a step's token sees in each kind of layer, where a model has layers that see the last tokens alone.

    windows: by the kind's name in the config, None for a layer that sees all.
    """

    def __init__(self, config: Any, windows: dict[str, int | None]) -> None:
        self.windows = windows
        self.mixed = getattr(config, "layer_types", None) is not None and len({*config.layer_types}) > 1
        self.eager = config._attn_implementation == "eager"

    def mask(self, slots: Slots, dtype: torch.dtype) -> Any:
        """(S, columns) where no window ends before the first column; else (S, 1, 1, columns), or one of these a kind of layer."""
        columns_L = torch.arange(slots.columns, device=slots.at_S.device)
        seen_SL = columns_L <= slots.at_S[:, None]
        narrow = [window for window in self.windows.values() if window is not None and window < slots.columns]
        if not narrow:
            return seen_SL.long()

        def within(window: int | None) -> Tensor:
            own = seen_SL if window is None else seen_SL & (columns_L > slots.at_S[:, None] - window)
            own = own[:, None, None]
            return own.to(dtype).sub(1).mul(torch.finfo(dtype).max) if self.eager else own

        return {kind: within(window) for kind, window in self.windows.items()} if self.mixed else within(narrow[0])


def layers_of(model: nn.Module) -> tuple[int, Windows] | str:
    """How many layers of keys and values the model's static cache has, and what these see; or why slots cannot stand in for it."""
    config: Any = model.config
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter puts tokens of its own before a prompt"
    if getattr(config, "is_encoder_decoder", False):
        return "its decoder reads what an encoder makes"
    config = config.get_text_config(decoder=True)
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}, not 'sdpa' or 'eager'"
    try:
        layers: list[Any] = StaticCache(config=config, max_cache_len=8).layers
    except Exception as error:
        return f"transformers has no static cache for it ({(str(error).splitlines() or [type(error).__name__])[0]})"
    other = next((layer for layer in layers if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)), None)
    if other is not None or not layers:
        return f"its cache holds more than keys and values ({type(other).__name__})"
    types = getattr(config, "layer_types", None) or [
        "sliding_attention" if layer.is_sliding else "full_attention" for layer in layers
    ]
    if "chunked_attention" in types:
        return "it attends by chunks"
    window = getattr(config, "sliding_window", None)
    windows = {kind: window if layer.is_sliding else None for kind, layer in zip(types, layers, strict=True)}
    return len(layers), Windows(config, windows)
