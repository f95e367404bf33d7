"""Parts of a model by the names of its parameters: blocks that descend in turn, and the shallow layers. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

NO_LAYERS = (
    "no name of what trains holds the number of a layer (schemes prefix, prompt and head train nothing within them)"
)

_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.*)$")
_FIRST_NORM = re.compile(r"^(input_|ln_?1|norm_?1)", re.IGNORECASE)
_BEFORE = re.compile(r"embed|shared|\bwte\b|\bwpe\b|project_in", re.IGNORECASE)  # read before the first layer
_BEHIND = re.compile(r"norm|ln_f|head|final|score|classif|pooler|\bcls\b|project_out", re.IGNORECASE)
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\b.*$")


def layer_of(name: str) -> tuple[str, int] | None:
    """The list of layers, and the place in it, that a parameter's qualified name tells; None outside of any.

    >>> layer_of("model.layers.11.mlp.up_proj.weight")
    ('model.layers', 11)
    """
    found = _LAYER.match(name)
    return (found[1] or "", int(found[2])) if found else None


def unit_of(name: str) -> str:
    """What stands right under the layer, its own number with it: `….self_attn`, or T5's `….layer.0`; "" outside of layers."""
    found = _LAYER.match(name)
    if not found:
        return ""
    child, _, rest = found[3].partition(".")
    number = rest.partition(".")[0]
    return f"{name[: found.start(3)]}{child}" + (f".{number}" if number.isdecimal() else "")


def _is_attention(unit: str, name: str) -> bool:
    child = unit[_LAYER.match(name).start(3) :] if unit else ""  # type: ignore[union-attr]
    inside = name[len(unit) - len(child) :] if unit else ""
    return bool(_FIRST_NORM.match(child)) or ("att" in inside.lower() and not child.startswith("post_"))


def partition(names: Sequence[str], kind: str) -> dict[str, list[str]]:
    """Blocks in the order of their first parameter: each name is in exactly one.

    Structure comes from the names: a layer is what stands under the first number. A module outside of any layer that owns
    parameters (an embedding, the last norm, a head) is a block of its own.
    Raises ValueError where there are no layers to tell apart.
    """
    blocks: dict[str, list[str]] = {}
    layered = False
    attention = {unit_of(name) for name in names if _is_attention(unit_of(name), name)}
    for name in names:
        layer = layer_of(name)
        layered = layered or layer is not None
        if kind == "linear" or layer is None:
            key = _ADAPTER.sub("", name) if _ADAPTER.search(name) else name.rpartition(".")[0]
        else:
            key = f"{layer[0]}.{layer[1]}".lstrip(".")
            if kind == "attention-mlp":
                key += ".attention" if unit_of(name) in attention else ".mlp"
        blocks.setdefault(key, []).append(name)
    if not layered and kind != "linear":
        raise ValueError(f"blocks={kind!r}: {NO_LAYERS}; use blocks='linear', or scheme full or lora")
    return blocks


def shallow(names: Sequence[str], fraction: float) -> set[str]:
    """The names before the layers, and in the first ⌊fraction·layers + ½⌋ of them. Raises ValueError without layers.

    An embedding is before them and a norm or a head behind them, wherever the model lists it; anything else stands
    where it is listed.
    """
    order: dict[tuple[str, int], int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            order.setdefault(layer, len(order))
    if not order:
        raise ValueError(f"hybrid: {NO_LAYERS}, so there is no depth to split at; use scheme full or lora")
    most = int(fraction * len(order) + 0.5)
    found: set[str] = set()
    layered = False
    for name in names:
        layer = layer_of(name)
        layered = layered or layer is not None
        before = bool(_BEFORE.search(name)) or (not layered and not _BEHIND.search(name))
        if order[layer] < most if layer is not None else before:
            found.add(name)
    if not found or len(found) == len(names):
        raise ValueError(f"hybrid={fraction}: of {len(order)} layers {most} train by the method; both parts need some")
    return found
