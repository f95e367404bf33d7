"""Keys and values of a fixed set of slots, each of which is at a token of its own.

transformers' static cache has one length for all rows. Here the key of a slot's token t is in column t, whatever the others are at.
Columns up to an answer's last are allotted once; those behind a slot's token hold what nobody looks at.
"""

# S slots, n of them, H heads, L columns, T tokens of a prompt, D width of a head.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer


@dataclass(frozen=True)
class Handed:
    """What a layer's cache gave a step: keys, values (S, H, L, D) of all columns seen, window: of the last of them at most, None
    for all; new_key, new_value (S, H, 1, D): of the step's token.
    """

    keys: Tensor
    values: Tensor
    new_key: Tensor
    new_value: Tensor
    window: int | None


class Slots:
    """Which slots a forward is of, and where they are; what all layers of a cache look at.

    reading: of a prefill the slots (n,) int64 that read their prompts; None: each slot writes its next token. at_S: (S,) int64, the
    column of that token. columns: how many of them a forward sees, a number of the host's. handed: by the cache of the layer that
    was last asked, in a step. defers: a step's keys and values are written by who attends to them.
    """

    def __init__(self, slots: int, columns: int, device: torch.device) -> None:
        self.reading: Tensor | None = None
        self.at_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.all_S = torch.arange(slots, device=device)
        self.room = self.columns = columns
        self.handed: Handed | None = None
        self.defers = False
        self.nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.at_S)


class SlotLayer(CacheLayerMixin):
    """One layer's keys (S, H, L, D), and its values."""

    is_compileable = True  # so that models make the mask of a step, and no shortcut that looks at the values of one
    is_sliding = False

    def __init__(self, slots: Slots, window: int | None = None) -> None:
        super().__init__()
        self.slots, self.window = slots, window

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
        if not slots.defers:
            self.keys[slots.all_S, :, slots.at_S] = key_states[:, :, 0]
            self.values[slots.all_S, :, slots.at_S] = value_states[:, :, 0]
        keys, values = self.keys[:, :, : slots.columns], self.values[:, :, : slots.columns]
        slots.handed = Handed(keys, values, key_states, value_states, self.window)
        return keys, values

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
    """What a model is given as `past_key_values`. windows: of each of its layers."""

    def __init__(self, windows: Sequence[int | None], slots: Slots) -> None:
        super().__init__(layers=[SlotLayer(slots, window) for window in windows])

    def take(self, other: SlotCache, slots_n: Tensor) -> None:
        """The first slots' keys and values ← those of another's slots."""
        for mine, layer in zip(self.layers, other.layers, strict=True):
            assert isinstance(mine, SlotLayer)
            assert isinstance(layer, SlotLayer)
            mine.take(layer, slots_n)


class Windows:
    """What a step's token sees in each kind of layer, where a model has layers that see the last tokens alone.

    windows: by the kind's name in the config, None for a layer that sees all. of_layers: each layer's.
    """

    def __init__(self, config: Any, windows: dict[str, int | None], of_layers: Sequence[int | None]) -> None:
        self.windows, self.of_layers = windows, of_layers
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

    def no_mask(self, slots: Slots) -> Any:
        """What stands where a model wants a mask, in a step that no mask is read in: of (S, 1, 1, columns), one number."""
        nothing = slots.nothing.expand(len(slots), 1, 1, slots.columns)
        return dict.fromkeys(self.windows, nothing) if self.mixed else nothing


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
    of_layers = [window if layer.is_sliding else None for layer in layers]
    return len(layers), Windows(config, dict(zip(types, of_layers, strict=True)), of_layers)
