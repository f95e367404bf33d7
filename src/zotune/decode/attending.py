"""A step's attention by a kernel of ours, in the place of the function that transformers' models look up.

A first step is taken as the model takes it, and looked at: whether each layer asks for plain causal attention to the keys and
values that its cache has just handed out, and under which mask. Where all do, later steps need no mask, and each layer's kernel
writes the token's key and value beside reading the others. Whatever does not fit is told by `NotServed`; then the step is taken
anew, as the model does it.
"""

# S slots, H heads of keys and values, L columns, D width of a head.

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zotune.decode.cache import Handed, Slots
from zotune.engines.parts import kernels_for

# What a model may hand to its attention function without meaning anything by it here, whatever the value; other things may be
# there and empty.
MEANINGLESS = {"position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "return_dict"}
NAMES = ("sdpa", "eager")


class NotServed(Exception):
    """The kernel is not for what a layer asks for."""


class Attention:
    """layers: of a model. serves: whether the kernel does for all of them; None: not known yet."""

    def __init__(self, layers: int, sample: Tensor) -> None:
        self.layers = layers
        self.serves: bool | None = None if kernels_for(sample) is not None else False

    @contextmanager
    def learning(self, slots: Slots) -> Iterator[None]:
        """A step meanwhile says whether the kernel serves."""
        fitting: list[bool] = []

        def plainly(name: str, own: Any) -> Callable[..., Any]:
            def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kwargs: Any) -> Any:
                with torch._C.DisableTorchFunction():
                    handed = _handed(slots, query, key, value, kwargs)
                    fitting.append(handed is not None and _is_mask_of(mask, slots, handed.window))
                plain = own or getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
                if plain is None:
                    raise NotServed(f"{type(module).__name__} has no function of its own")
                return plain(module, query, key, value, mask, **kwargs)

            return attention

        slots.handed = None
        with _in_their_place(plainly):
            yield
        self.serves = len(fitting) == self.layers and all(fitting)

    @contextmanager
    def serving(self, slots: Slots) -> Iterator[None]:
        """The kernel computes a step's attention meanwhile. Raises NotServed where it could not, somewhere."""
        served = 0

        def by_kernel(name: str, own: Any) -> Callable[..., Any]:
            def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kwargs: Any) -> Any:
                nonlocal served
                with torch._C.DisableTorchFunction():
                    handed = _handed(slots, query, key, value, kwargs)
                    if handed is None:
                        raise NotServed(type(module).__name__)
                    served += 1
                    slots.handed = None
                    return _attend(slots, handed, query, kwargs), None

            return attention

        slots.defers = True
        try:
            with _in_their_place(by_kernel):
                yield
        finally:
            slots.defers, slots.handed = False, None
        if served != self.layers:
            raise NotServed(f"{served} layers of {self.layers}")


@contextmanager
def _in_their_place(made: Callable[[str, Any], Callable[..., Any]]) -> Iterator[None]:
    """What models look up is what is made of a name and the function that stood there, meanwhile."""
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = dict(local)
    for name in NAMES:
        ALL_ATTENTION_FUNCTIONS[name] = made(name, ALL_ATTENTION_FUNCTIONS.get(name))
    try:
        yield
    finally:
        local.clear()
        local.update(before)


def _handed(slots: Slots, query: Tensor, key: Any, value: Any, kwargs: dict[str, Any]) -> Handed | None:
    """What the cache has handed out, if that is what the layer attends to, by nothing but softmax(q·Kᵀ)·V."""
    handed = slots.handed
    if handed is None or key is not handed.keys or value is not handed.values:
        return None
    from zotune.decode.kernels import MOST_SHARING, WIDEST_HEAD

    known = {"dropout", "scaling", "softcap", "sliding_window"}
    more = any(name not in MEANINGLESS | known and given is not None for name, given in kwargs.items())
    window = kwargs.get("sliding_window")
    if more or kwargs.get("dropout") or (window is not None and window != handed.window):
        return None
    rows, heads, tokens, wide = query.shape
    sharing, rest = divmod(heads, key.shape[1])
    fits = rows == len(slots) and tokens == 1 and rest == 0 and sharing <= MOST_SHARING
    fits = fits and wide == key.shape[-1] == value.shape[-1] and wide <= WIDEST_HEAD
    fits = fits and query.dtype == key.dtype == value.dtype == handed.new_key.dtype == handed.new_value.dtype
    fits = fits and all(t.stride(-1) == 1 for t in (query, handed.new_key, handed.new_value))
    return handed if fits else None


def _is_mask_of(mask: Any, slots: Slots, window: int | None) -> bool:
    """Whether the mask lets each slot see its own columns, or the last of them, and does nothing else."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1:] != (1, 1, slots.columns):
        return False
    columns_L = torch.arange(slots.columns, device=mask.device)
    seen_SL = columns_L <= slots.at_S[:, None]
    if window is not None:
        seen_SL &= columns_L > slots.at_S[:, None] - window
    if mask.dtype == torch.bool:
        return torch.equal(mask[:, 0, 0].expand_as(seen_SL), seen_SL)
    least = torch.finfo(mask.dtype).min / 2
    added_SL = mask[:, 0, 0].expand_as(seen_SL)
    return bool(torch.where(seen_SL, added_SL == 0, added_SL <= least).all())


def _attend(slots: Slots, handed: Handed, query: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(S, 1, H, D), as transformers' functions give it."""
    from zotune.decode.kernels import attend

    scaling = kwargs.get("scaling")
    out_SHD = attend(
        query[:, :, 0], handed.new_key[:, :, 0], handed.new_value[:, :, 0], handed.keys, handed.values, slots.at_S,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling), kwargs.get("softcap"), handed.window,
    )  # fmt: skip
    return out_SHD[:, None]
