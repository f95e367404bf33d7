# mypy: disable-error-code="no-untyped-def,attr-defined"
"""The rules that read ĝ element by element as one pass over the weights, on CUDA, by Triton.

What `Rule.move` in `zotune.updates` does to a tile, under the same names: ĝ is drawn where it is used, all queries at once, and
weight and state are read and written once. Seeds, ĝ's coefficients, lr and all that follows from it are read from memory, so
that a captured graph can be replayed with new ones.
"""

# Q pairs, G parameter groups, N numbers of a rule. A tile is (T, E), as in `zotune.noise.drawing`.

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.directions import FEW, Directions
from zotune.noise.drawing import TL_DTYPE, draw, signed, tile_of

if TYPE_CHECKING:
    from zotune.updates.rule import Rule

TILE = 1024  # elements a program: four tensors of them, and the noise, are in registers
ALIGNED = 16  # bytes of an address, elements of a size: what a launch needs to know to read many at once
SPAN = 1 << 22  # elements of a masked parameter a launch: its mask is made that far


@triton.jit
def _move(w_TE, g_TE, m_TE, v_TE, numbers, RULE: tl.constexpr):
    """`move` of the rule, after decay: weights and moments. numbers: the rule's `numbers`."""
    wide: tl.constexpr = w_TE.dtype
    w_TE = w_TE * tl.load(numbers).to(wide)
    lr = tl.load(numbers + 1).to(wide)
    if RULE == "sgd":
        w_TE = w_TE - lr * g_TE
    if RULE == "sign":
        sign_TE = (g_TE > 0).to(wide) - (g_TE < 0).to(wide)
        w_TE = w_TE - lr * sign_TE
    if RULE == "momentum":
        m_TE = m_TE * tl.load(numbers + 2).to(wide) + g_TE
        w_TE = w_TE - lr * m_TE
    if RULE == "adam":
        m_TE = m_TE * tl.load(numbers + 2).to(wide) + g_TE * tl.load(numbers + 3).to(wide)
        v_TE = v_TE * tl.load(numbers + 4).to(wide) + g_TE * g_TE * tl.load(numbers + 5).to(wide)
        correction = tl.load(numbers + 6).to(wide)
        epsilon = tl.load(numbers + 7).to(wide)
        if wide == tl.float64:
            w_TE = w_TE - lr * (m_TE / (tl.sqrt(v_TE / correction) + epsilon))
        else:
            root_TE = tl.sqrt_rn(tl.div_rn(v_TE, correction)) + epsilon
            w_TE = w_TE - lr * tl.div_rn(m_TE, root_TE)
    return w_TE, m_TE, v_TE


@triton.jit
def _narrowed(x_TE, dtype: tl.constexpr):
    """To 16 bits by way of float32, as torch does from float64."""
    narrow_TE = x_TE if dtype == tl.float64 else x_TE.to(tl.float32).to(dtype)
    return narrow_TE


@triton.jit
def _update(
    w, m, v, lost, keep, at_TE, inside, group_T, seeds, g, Q: tl.constexpr, numbers, pid,
    RULE: tl.constexpr, MOMENTS: tl.constexpr, COMPENSATED: tl.constexpr, MASKED: tl.constexpr, GIVEN: tl.constexpr,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A tile's weights, moments, and what rounding has taken, read, moved and written. keep: where ĝ is not zero.

    GIVEN: g is a gradient of the weights' shape, and nothing is drawn.
    """
    old_TE = tl.load(w + at_TE, mask=inside, other=0.0)
    wide: tl.constexpr = tl.float64 if old_TE.dtype == tl.float64 else tl.float32
    if GIVEN:
        g_TE = tl.load(g + at_TE, mask=inside, other=0.0).to(wide)
    else:
        g_TE = tl.zeros((T, E), dtype=wide)
        for q in range(Q):
            z_TE = draw(tl.load(seeds + q), pid, group_T, GAUSSIAN, E, T)
            g_TE += tl.load(g + q).to(wide) * z_TE.to(wide)
    if MASKED:
        g_TE = tl.where(tl.load(keep + at_TE, mask=inside, other=0) != 0, g_TE, 0.0)
    w_TE = old_TE.to(wide)
    if COMPENSATED:
        lost_TE = tl.load(lost + at_TE, mask=inside, other=0.0)
        w_TE += lost_TE.to(wide)
    m_TE = g_TE
    v_TE = g_TE
    if MOMENTS > 0:
        m_TE = tl.load(m + at_TE, mask=inside, other=0.0).to(wide)
    if MOMENTS > 1:
        v_TE = tl.load(v + at_TE, mask=inside, other=0.0).to(wide)
    w_TE, m_TE, v_TE = _move(w_TE, g_TE, m_TE, v_TE, numbers, RULE)
    changes = (tl.load(numbers) != 1.0).to(tl.int32) + (tl.load(numbers + 1) != 0.0).to(tl.int32)
    moves = inside & (changes != 0)  # else not even a zero's sign changes
    new_TE = w_TE.to(old_TE.dtype)
    tl.store(w + at_TE, new_TE, mask=moves)
    if COMPENSATED:
        tl.store(lost + at_TE, (w_TE - new_TE.to(wide)).to(old_TE.dtype), mask=moves)
    if MOMENTS > 0:
        tl.store(m + at_TE, _narrowed(m_TE, m.dtype.element_ty), mask=inside)
    if MOMENTS > 1:
        tl.store(v + at_TE, _narrowed(v_TE, v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pid"])
def _one_kernel(
    w, m, v, lost, keep, n, group, seeds, g, Q: tl.constexpr, numbers, goes, pid,
    RULE: tl.constexpr, MOMENTS: tl.constexpr, COMPENSATED: tl.constexpr, MASKED: tl.constexpr, GIVEN: tl.constexpr,
    GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Element i of w is element E·group + i of the parameter."""
    step_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :]
    inside = (at_TE < n) & (tl.load(goes) != 0)
    _update(
        w, m, v, lost, keep, at_TE, inside, group + step_T, seeds, g, Q, numbers, pid,
        RULE, MOMENTS, COMPENSATED, MASKED, GIVEN, GAUSSIAN, E, T,
    )  # fmt: skip


@triton.jit
def _many_kernel(
    tile_item, tile_first, ws, ms, vs, losts, sizes, pids, groups, seeds, g, Q: tl.constexpr, numbers, N: tl.constexpr,
    goes, RULE: tl.constexpr, MOMENTS: tl.constexpr, COMPENSATED: tl.constexpr, DTYPE: tl.constexpr,
    KEPT: tl.constexpr, EVEN: tl.constexpr, GAUSSIAN: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Tile t: elements tile_first[t]·E, … of item tile_item[t]. EVEN: whether all sizes are multiples of `ALIGNED`."""
    item = tl.load(tile_item + tl.program_id(0))
    step_T = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, T)
    at_TE = step_T[:, None] * E + tl.arange(0, E)[None, :]
    n = tl.load(sizes + item)
    if EVEN:
        n = tl.multiple_of(n, 16)
    inside = (at_TE < n) & (tl.load(goes) != 0)
    group = tl.load(groups + item)
    # all are ALIGNED: where sizes are even too, neighbours are read at once
    w = tl.multiple_of(tl.load(ws + item).to(tl.pointer_type(DTYPE)), 16)
    m = tl.multiple_of(tl.load(ms + item).to(tl.pointer_type(KEPT)), 16)
    v = tl.multiple_of(tl.load(vs + item).to(tl.pointer_type(KEPT)), 16)
    lost = tl.multiple_of(tl.load(losts + item).to(tl.pointer_type(DTYPE)), 16)
    _update(
        w, m, v, lost, w, at_TE, inside, step_T, seeds, g + group * Q, Q, numbers + group * N, tl.load(pids + item),
        RULE, MOMENTS, COMPENSATED, False, False, GAUSSIAN, E, T,
    )  # fmt: skip


def _kind(kernel: str, buffers: Sequence[str]) -> dict[str, Any]:
    compensated = "residual" in buffers
    return {"RULE": kernel, "MOMENTS": len(buffers) - compensated, "COMPENSATED": compensated}


def _placed(kind: dict[str, Any], own: list[Any], absent: Any) -> tuple[Any, Any, Any]:
    """m, v and what rounding took, of a parameter's buffers."""
    moments = [*own[: kind["MOMENTS"]], absent, absent]
    return moments[0], moments[1], own[-1] if kind["COMPENSATED"] else absent


class Update:
    """A rule's pass over the parameters of some directions, in place; small parameters share a launch.

    Parameters and their buffers stay where they are in memory as long as this object, or a graph that holds its launches, is used.
    """

    def __init__(self, kernel: str, directions: Directions, state: MutableMapping[Any, Any], buffers: Sequence[str]):
        """kernel: the rule's, or that of decay alone. buffers: names in a parameter's state, the moments first, then
        "residual" if rounding is compensated.
        """
        self.directions, self.buffers = directions, tuple(buffers)
        self.kind = _kind(kernel, self.buffers)
        moments = self.kind["MOMENTS"]
        self.tile = tile_of(directions.distribution, TILE)
        self.alone: list[tuple[Any, list[Tensor]]] = []
        self.few: dict[
            tuple[Any, Any, bool], list[tuple[Any, list[Tensor]]]
        ] = {}  # kept, or their memory might be reused
        for param in filter(torch.numel, directions.params):
            own = [state[param][name] for name in self.buffers]
            alike = (param.dtype, own[0].dtype if moments else param.dtype, param.numel() % ALIGNED == 0)
            aligned = all(t.data_ptr() % ALIGNED == 0 for t in (param, *own))
            if param.numel() <= FEW and param.is_contiguous() and aligned and not directions.masked:
                self.few.setdefault(alike, []).append((param, own))
            else:
                self.alone.append((param, own))
        self.together = [(alike, self._tables(items)) for alike, items in self.few.items()]
        device = directions.params[0].device
        self.goes = torch.ones((), dtype=torch.int32, device=device)

    def run(self, seeds_Q: Tensor, g_GQ: Tensor, numbers_GN: Tensor, goes: Tensor | None = None) -> None:
        """ĝ = Σ_q g_GQ[group][q]·z(seeds_Q[q]), g_GQ float32; numbers_GN float64, the rule's for each group; all contiguous,
        on the device. goes: 0-d int32; where it is zero nothing changes.
        """
        goes = self.goes if goes is None else goes
        for param, own in self.alone:
            self._alone(param, own, seeds_Q, g_GQ, numbers_GN, goes)
        for (dtype, kept, even), tables in self.together:
            _many_kernel[(len(tables[0]),)](
                *tables, seeds_Q, g_GQ, len(seeds_Q), numbers_GN, numbers_GN.shape[1], goes,
                DTYPE=TL_DTYPE[dtype], KEPT=TL_DTYPE[kept], EVEN=even, **self.kind, **self.tile,
            )  # fmt: skip

    def _alone(
        self, param: Any, own: list[Tensor], seeds_Q: Tensor, g_GQ: Tensor, numbers_GN: Tensor, goes: Tensor
    ) -> None:
        slot, flat = self.directions.slots[id(param)], param.data.reshape(-1)  # a copy only of a permuted view
        size: int = SPAN if self.directions.masked else flat.numel()
        for first in range(0, flat.numel(), size):
            w, *rest = (t.view(-1)[first : first + size] for t in (flat, *own))
            n = w.numel()
            keep = self.directions.kept(param, first, n)
            m, v, lost = _placed(self.kind, rest, w)
            _one_kernel[(triton.cdiv(n, TILE),)](
                w, m, v, lost, w if keep is None else keep.view(torch.uint8), n, first // self.tile["E"],
                seeds_Q, g_GQ[slot.group], len(seeds_Q), numbers_GN[slot.group], goes, signed(slot.id),
                MASKED=keep is not None, GIVEN=False, **self.kind, **self.tile,
            )  # fmt: skip
        if not param.data.is_contiguous():
            param.data.copy_(flat.view(param.shape))

    def _tables(self, items: Sequence[tuple[Any, list[Tensor]]]) -> tuple[Tensor, ...]:
        device, groups_a_tile = items[0][0].device, self.tile["T"]
        tile_item, tile_first, places, sizes, slots = [], [], [], [], []
        for i, (param, own) in enumerate(items):
            for first in range(0, triton.cdiv(param.numel(), self.tile["E"]), groups_a_tile):
                tile_item.append(i)
                tile_first.append(first)
            places.append((param.data_ptr(), *_placed(self.kind, [t.data_ptr() for t in own], 0)))
            sizes.append(param.numel())
            slots.append(self.directions.slots[id(param)])
        return (
            torch.tensor(tile_item, dtype=torch.int32, device=device),
            torch.tensor(tile_first, dtype=torch.int64, device=device),
            *torch.tensor(places, dtype=torch.int64, device=device).t().contiguous(),
            torch.tensor(sizes, dtype=torch.int64, device=device),
            torch.tensor([signed(slot.id) for slot in slots], dtype=torch.int32, device=device),
            torch.tensor([slot.group for slot in slots], dtype=torch.int32, device=device),
        )


def update_of(rule: Rule, directions: Directions, state: MutableMapping[Any, Any]) -> Update:
    """The rule's pass over the parameters of the directions; the last one again where nothing has moved in memory."""
    rule.reserve(directions.params, state)
    names = rule.kept_names
    where = ((p.dtype, p.data_ptr(), *(state[p][name].data_ptr() for name in names)) for p in directions.params)
    key = (rule.kernel, *where)
    if directions.update is None or directions.update[0] != key:
        directions.update = key, Update(rule.kernel, directions, state, names)
    update: Update = directions.update[1]
    return update


def descend(
    rule: Rule, param: Any, gradient: Tensor, own: MutableMapping[str, Any], numbers_N: Tensor, goes: Tensor
) -> None:
    """The rule's pass over one parameter by a gradient of its shape, in place: what `Rule.descend` does. own: its state, which
    `Rule.reserve` has made. numbers_N and goes: as of `Update.run`, of its group.
    """
    flat, slope = param.data.reshape(-1), gradient.reshape(-1).contiguous()
    if not flat.numel():
        return
    kind, tile = _kind(rule.kernel, rule.kept_names), tile_of("gaussian", TILE)
    m, v, lost = _placed(kind, [own[name].view(-1) for name in rule.kept_names], flat)
    _one_kernel[(triton.cdiv(flat.numel(), TILE),)](
        flat, m, v, lost, flat, flat.numel(), 0, flat, slope, 0, numbers_N, goes, 0,
        MASKED=False, GIVEN=True, **kind, **tile,
    )  # fmt: skip
    if not param.data.is_contiguous():
        param.data.copy_(flat.view(param.shape))
