"""The options that change what a step perturbs: sparse directions, one block at a time, the shallow layers alone.

Source: arXiv 2402.11592, section 5 (block-wise descent, hybrid training, gradient sparsity).
"""

# n elements of a parameter.

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement, signed
from zotune.directions.calibration import Norms, by_output, chunk_of, scores
from zotune.errors import InputError, nearest
from zotune.record.trajectory import float32

logger = logging.getLogger(__name__)

MASKS = ("random", "magnitude", "wanda")
SCOPES = ("layer", "global")
NO_LAYERS = (
    "no name of what trains holds the number of a layer (schemes prefix, prompt and head train nothing within them)"
)
BLOCKS = ("transformer", "attention-mlp", "linear")
UPDATES = ("gauss-seidel", "jacobi")

CHUNK = 1 << 20  # elements masked at a time


@dataclass(frozen=True)
class Enhancements:
    """sparsity: the fraction of elements that a step leaves out, of its probes and its update alike. mask: which: "random" ones,
        those of least "magnitude", or those of least weight times input, "wanda". sparsity_scope: the fraction of each
        tensor ("layer"; of each output with wanda), or of all weights together ("global"), where a tensor's own
        fraction is its share of the smallest. mask_refresh: steps until a mask is drawn anew; None keeps the first.
    blocks: descend one block after another, each step all of them: "transformer" (embeddings, each layer, the rest),
        "attention-mlp" (each layer in two), "linear" (each module that owns parameters). block_update: "gauss-seidel" moves a
        block before the next is probed, "jacobi" all at the end.
    hybrid: the fraction of the layers, from the input on, that train by the method; the others by back-propagation, at fo_lr.
    g_clip: bound on |g| of each direction.
    """

    sparsity: float | None = None
    mask: str | None = None
    sparsity_scope: str | None = None
    mask_refresh: int | None = None
    blocks: str | None = None
    block_update: str | None = None
    hybrid: float | None = None
    fo_lr: float | None = None
    g_clip: float | None = None

    def __post_init__(self) -> None:
        for name, of, choices in (
            ("mask", "sparsity", MASKS),
            ("sparsity_scope", "sparsity", SCOPES),
            ("blocks", None, BLOCKS),
            ("block_update", "blocks", UPDATES),
            ("mask_refresh", "sparsity", None),
            ("fo_lr", "hybrid", None),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if choices and value not in choices:
                raise ValueError(f"unknown {name} {value!r}; {nearest(str(value), choices)}")
            if of and getattr(self, of) is None:
                raise ValueError(f"{name}={value!r}: means nothing without {of}")
        self._check("sparsity", self.sparsity is None or 0 <= self.sparsity < 1, "at least 0 and under 1")
        self._check("mask_refresh", self.mask_refresh is None or self.mask_refresh >= 1, "a number of steps from 1")
        self._check("hybrid", self.hybrid is None or 0 < self.hybrid < 1, "a fraction of the layers, between 0 and 1")
        self._check("fo_lr", self.fo_lr is None or self.fo_lr >= 0, "at least 0")
        self._check("g_clip", self.g_clip is None or self.g_clip > 0, "above 0")
        if self.hybrid is not None and self.fo_lr is None:
            raise ValueError("hybrid: needs fo_lr, the learning rate of the layers that back-propagation trains")
        if self.hybrid is not None and self.blocks is not None:
            raise ValueError("hybrid and blocks: choose one; both say which layers a probe perturbs")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {wanted}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @property
    def sequential(self) -> bool:
        """Whether they need the engine that perturbs any set of weights by any direction."""
        return self.sparsity is not None or self.blocks is not None or self.hybrid is not None

    def refuse(self, method: str, first_order: bool, conservative: bool) -> None:
        """Raise ValueError for what does not go with a method."""
        given = [name for name in ("sparsity", "blocks", "hybrid", "g_clip") if getattr(self, name) is not None]
        if first_order and given:
            raise ValueError(
                f"{given[0]}: method {method!r} has no direction to apply it to; it is for zo-* and forward-grad"
            )
        if conservative and (self.blocks is not None or self.hybrid is not None):
            raise ValueError(
                f"{'blocks' if self.blocks else 'hybrid'}: method {method!r} compares one move of all weights; use zo-sgd"
            )


# Blocks

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


# Masks


class Mask:
    """Which elements of a parameter a step's directions reach.

    Random: element i of a parameter is left out where its word of the mask's stream is under sparsity·2³²; the seed is that of the
    step at which the mask was drawn, so nothing is stored. Magnitude: the least |θ| at that step, one byte an element, in
    the optimizer's state. Wanda: the least |W_oi|·‖x_i‖₂ of each output o of a linear map within the layers, over some rows
    of data; with scope "global", of all these maps together. As in its paper embeddings, norms, biases and the head have no
    mask. State as for magnitude. Sources: arXiv 2402.11592, section 5; Wanda, arXiv 2306.11695.
    """

    def __init__(self, of: Enhancements, seed: int) -> None:
        assert of.sparsity is not None
        self.sparsity, self.seed = of.sparsity, seed
        self.kind, self.scope, self.refresh = of.mask or "random", of.sparsity_scope or "layer", of.mask_refresh
        self.drawn: int | None = None
        self.state: MutableMapping[Any, Any] = {}
        self.version = 0  # grows where a mask is not written into the places of the one before
        self._seeds: dict[torch.device, Tensor] = {}

    def at(
        self, step: int, named: Mapping[str, Any], state: MutableMapping[Any, Any], norms: Callable[[int], Norms]
    ) -> None:
        """The mask of a step; weights are read, and `norms` called, at the steps that draw one."""
        self.state, self.drawn = state, step // self.refresh * self.refresh if self.refresh else 0
        seed = signed(noise.step_seed(self.seed, self.drawn))
        for seed_1 in self._seeds.values():
            seed_1.fill_(seed)
        key, params = "sparsity" if self.kind == "random" else "kept", list(named.values())
        if any(key not in state[p] for p in params) or (step == self.drawn and self.kind != "random"):
            if self.kind == "wanda":
                self._weigh(named, norms(self.drawn))
            else:
                self._measure(params)

    def keep(self, param: Any, pid: int, first: int, count: int) -> Tensor | None:
        """(n,) bool: True where elements first, first + 1, … are perturbed. None: all of them are."""
        own = self.state[param]
        if self.kind != "random":
            return None if own["kept"] is None else own["kept"][first : first + count]
        return noise.kept(count, self._seed_on(param.device), pid, own["sparsity"], first)

    def keep_rows(self, param: Any, pid: int, rows_K: Tensor) -> Tensor | None:
        """(K, D) bool: the same of the rows named."""
        own, width = self.state[param], param[0].numel()
        if self.kind != "random":
            return None if own["kept"] is None else own["kept"].view(-1, width)[rows_K]
        return noise.kept_rows(rows_K, width, self._seed_on(param.device), pid, own["sparsity"])

    def _seed_on(self, device: torch.device) -> Tensor:
        """(1,) int64, the mask's seed: always in the same place, where a graph reads that of the mask of its step."""
        if device not in self._seeds:
            seed = signed(noise.step_seed(self.seed, self.drawn or 0))
            self._seeds[device] = torch.tensor([seed], dtype=torch.int64, device=device)
        return self._seeds[device]

    def _write(self, param: Any, key: str, value: Any) -> None:
        """A mask's part for a parameter, into the tensor of the one before where there is one."""
        own = self.state[param]
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
            own[key].copy_(value)
        elif key not in own or (own[key] is not value and own[key] != value):
            own[key] = value
            self.version += 1

    def _measure(self, params: Sequence[Any]) -> None:
        for tensors in [list(params)] if self.scope == "global" else [[p] for p in params]:
            if self.kind == "random" and self.scope == "layer":
                self._write(tensors[0], "sparsity", self.sparsity)
                continue
            edge, ties = smallest([p.data for p in tensors], int(self.sparsity * sum(p.numel() for p in tensors)))
            for param in tensors:
                left_out, ties = _under(_bits(param.data), edge, ties)
                kept = ~left_out
                if self.kind == "magnitude":
                    self._write(param, "kept", kept)
                else:
                    self._write(param, "sparsity", 1 - int(kept.sum()) / max(kept.numel(), 1))

    def _weigh(self, named: Mapping[str, Any], norms: Norms) -> None:
        """Wanda's mask. Of equal scores the first are left out."""
        inside = [name for name, p in named.items() if layer_of(name) is not None and p.dim() > 1]
        maps = [(named[name], norms[name]) for name in inside if name in norms]
        if not maps:
            raise InputError(
                "mask='wanda': no trained parameter is the weight of a linear map within a numbered layer; "
                "use mask='magnitude'"
            )
        if len(maps) < len(inside):
            unread = next(name for name in inside if name not in norms)
            logger.warning(
                "mask wanda: %d of %d matrices within the layers are read by no linear map, so they have no mask (first: %s)",
                len(inside) - len(maps), len(inside), unread,
            )  # fmt: skip
        empty = next((name for name in inside if not bool(named[name].any())), None)
        if empty is not None:
            raise InputError(
                f"mask='wanda': {empty} is all zero, so its scores tell no weight from another (LoRA starts so); "
                "use mask='random'"
            )
        masked = {id(param) for param, _ in maps}
        for param in named.values():
            if id(param) not in masked:
                self._write(param, "kept", None)
        edge, ties = 0, 0
        if self.scope == "global":
            edge, ties = smallest(_Scores(maps), int(self.sparsity * sum(p.numel() for p, _ in maps)))
        for param, norm in maps:
            kept = torch.ones(param.shape, dtype=torch.bool, device=param.device)
            rows = by_output(kept, norm).split(chunk_of(param, norm))
            for kept_oI, scores_oI in zip(rows, scores(param, norm), strict=True):
                if self.scope == "global":
                    left_out, ties = _under(_bits(scores_oI), edge, ties)
                    kept_oI.copy_(~left_out.view(scores_oI.shape))
                else:
                    least = scores_oI.argsort(dim=1, stable=True)[:, : int(self.sparsity * scores_oI.shape[1])]
                    kept_oI.scatter_(1, least, False)
            self._write(param, "kept", kept.view(-1))


class _Scores:
    """Wanda's scores of some weights, made anew each time they are gone through."""

    def __init__(self, maps: Sequence[tuple[Any, Tensor]]) -> None:
        self.maps = maps

    def __iter__(self) -> Iterator[Tensor]:
        for param, norm in self.maps:
            yield from scores(param, norm)


def _under(bits: Tensor, edge: int, ties: int) -> tuple[Tensor, int]:
    """(n,) bool: what is under the edge, and the first `ties` at it; and how many of these are still to come."""
    equal = bits == edge
    also = equal & (equal.cumsum(0) <= ties)
    return (bits < edge) | also, ties - int(also.sum())


def smallest(tensors: Iterable[Tensor], k: int) -> tuple[int, int]:
    """(edge, ties): the k smallest |x| are those whose float32 bits are under edge, and `ties` of those at it.

    Two passes of counting, 16 bits each: no sort, no copy but of one tensor at a time. They are gone through twice.
    """
    if k <= 0:
        return 0, 0
    edge = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in tensors:
            bits = _bits(tensor)
            if shift == 0:
                bits = bits[bits >> 16 == edge >> 16]
            counts += torch.bincount(bits >> shift & 0xFFFF, minlength=1 << 16).cpu()
        reached = counts.cumsum(0)
        place = int(torch.searchsorted(reached, k))
        k -= int(reached[place - 1]) if place else 0
        edge |= place << shift
    return edge, k


def _bits(tensor: Tensor) -> Tensor:
    """(n,) int32: the bits of |x| in float32, in the order of |x|."""
    return tensor.detach().reshape(-1).abs().float().view(torch.int32)


class MaskedDirections(Directions):
    """Directions that are zero where a mask says so: a weight that is left out keeps its bits."""

    mask: Mask
    masked = True

    def kept(self, param: torch.nn.Parameter, first: int, count: int) -> Tensor | None:
        return self.mask.keep(param, self.slots[id(param)].id, first, count)

    def displaced(self, param: torch.nn.Parameter, by: Displacement | HeldDisplacement, out: Tensor) -> Tensor:
        return self._masked(param, param.data, 0, by, out)

    def displaced_span(
        self, param: torch.nn.Parameter, first: int, last: int, by: Displacement | HeldDisplacement, out: Tensor
    ) -> Tensor:
        return self._masked(param, param.data[first:last], first * param[0].numel(), by, out)

    def displaced_rows(
        self,
        param: torch.nn.Parameter,
        rows_K: Tensor,
        by: Displacement | HeldDisplacement,
        out: Tensor,
        update: Displacement | HeldDisplacement | None = None,
    ) -> Tensor:
        super().displaced_rows(param, rows_K, by, out, update)
        keep_KD = self.mask.keep_rows(param, self.slots[id(param)].id, rows_K)
        return out if keep_KD is None else out.copy_(torch.where(keep_KD.view(out.shape), out, param.data[rows_K]))

    def apply(self, by: Displacement | HeldDisplacement, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        for param in self.params if params is None else params:
            if not by.is_zero(self.slots[id(param)].group):
                self.displaced(param, by, param.data)

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        params: Sequence[torch.nn.Parameter] | None = None,
    ) -> None:
        """As `Directions.apply_compensated`, by tiles; decay reaches every weight, as it does elsewhere."""
        for param, lost in zip(self.params if params is None else params, residuals, strict=True):
            group = self.slots[id(param)].group
            factor = factors[group] if factors else 1.0
            if not isinstance(factor, Tensor):  # as a graph has it, for float64 weights too
                factor = float32(factor)
            flat, lost_n = param.data.reshape(-1), lost.view(-1)
            for first, moved in self.gradient_tiles(param, by, CHUNK):
                part = slice(first, first + moved.numel())
                total = (flat[part].to(moved.dtype) + lost_n[part].to(moved.dtype)) * factor + moved
                rounded = total.to(param.dtype)
                moves = (moved != 0) | (factor != 1)  # a tie that was rounded once is not rounded again
                lost_n[part] = torch.where(moves, (total - rounded.to(moved.dtype)).to(param.dtype), lost_n[part])
                flat[part] = torch.where(moves, rounded, flat[part])
            if not param.data.is_contiguous():
                param.data.copy_(flat.view(param.shape))

    def _masked(
        self, param: torch.nn.Parameter, w: Tensor, start: int, by: Displacement | HeldDisplacement, out: Tensor
    ) -> Tensor:
        seeds, coefs = by.on(self.slots[id(param)].group, param.device)
        flat = w.reshape(-1)
        into = out.view(-1) if out.is_contiguous() else torch.empty_like(flat)
        for first in range(0, flat.numel(), CHUNK):
            part = slice(first, min(first + CHUNK, flat.numel()))
            self._add(into[part], flat[part], seeds, coefs, param, start + first)
        if not out.is_contiguous():
            out.copy_(into.view(out.shape))
        return out

    def _add(
        self, out: Tensor, w: Tensor, seeds: Tensor, coefs: Tensor, param: torch.nn.Parameter, start: int = 0
    ) -> None:
        moved = torch.empty_like(w)
        super()._add(moved, w, seeds, coefs, param, start)
        keep = self.kept(param, start, w.numel())
        if keep is None:
            out.copy_(moved)
        else:
            torch.where(keep, moved, w, out=out)
