"""A decode step's products with each slot's own low-rank term, beside float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from zotune.decode.members import Population
from zotune.decode.seats import MemberWeights
from zotune.directions import Directions
from zotune.engines import parts
from zotune.engines.gating import GATES

products = pytest.importorskip("zotune.decode.products", reason="triton is missing")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(5, 70, (33, 17, 130)), (67, 129, (65, 16, 2)), (1, 64, (64, 32, 32))]  # slots, inputs, outputs


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def a_step(slots, wide, outs, rank, dtype, bias=None, transposed=False):
    """x, maps, which and scale: half as many directions as slots, the second slot's scale 0. x is the half of wider rows."""
    count = slots // 2 + 1
    maps = []
    for i, out in enumerate(outs):
        w = drawn(wide, out, dtype=dtype, seed=10 * i).t() if transposed else drawn(out, wide, dtype=dtype, seed=10 * i)
        v, u = (
            drawn(count, wide, rank, dtype=dtype, seed=10 * i + 1),
            drawn(count, out, rank, dtype=dtype, seed=10 * i + 2),
        )
        shift = {None: None, "all": drawn(out, dtype=dtype), "each": drawn(slots, out, dtype=dtype)}[bias]
        maps.append(products.Map(w, v, u, shift))
    which = (torch.arange(slots, device=DEVICE) * 7 % count).int()
    scale = drawn(slots, seed=5) / 3
    scale[1:2] = 0
    return drawn(slots, 2 * wide, dtype=dtype, seed=6)[:, :wide], maps, which, scale


def exact(x, m, which, scale):
    x, w, v, u = (t.double() for t in (x, m.w, m.v, m.u))
    inner = torch.einsum("sd,sdr->sr", x, v[which.long()]) * scale.double()[:, None]
    y = x @ w.t() + torch.einsum("sr,snr->sn", inner, u[which.long()])
    return y if m.bias is None else y + m.bias.double()


def near(found, wanted, dtype, maps=()):
    """Rounded once, from sums of float32 (the interpreter truncates to 16 bits). maps: twice, if the library has their products."""
    assert found.dtype == dtype
    eps, most = torch.finfo(dtype).eps, float(wanted.abs().max())
    twice = bool(maps) and not products.in_one(maps, len(found))
    torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=(4e-6 + eps * twice) * most)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("maps", "bias"), [(1, None), (2, "all"), (3, "each"), (3, None)], ids=str)
def test_all_maps_of_one_x_are_their_formula_rounded_once(shape, rank, maps, bias, dtype):
    slots, wide, outs = shape
    x, some, which, scale = a_step(slots, wide, outs[:maps], rank, dtype, bias)
    assert products.serves(x, *some)
    for found, m in zip(products.products(x, some, which, scale), some, strict=True):
        assert found.is_contiguous()
        near(found, exact(x, m, which, scale), dtype, some)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("maps", "bias"), [(1, None), (2, "all"), (3, "each")], ids=str)
def test_terms_beside_products_of_the_library_are_the_formula(maps, bias, dtype, monkeypatch):
    """Of maps too large for one launch: 300 outputs are two tiles, 2,100 inputs two sums."""
    monkeypatch.setattr(products, "LARGEST", 0)
    x, some, which, scale = a_step(5, 2100, (300, 17, 130)[:maps], 2, dtype, bias)
    for found, m in zip(products.products(x, some, which, scale), some, strict=True):
        near(found, exact(x, m, which, scale), dtype, some)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_may_lie_the_other_way_round(dtype):
    """As GPT-2's do."""
    x, some, which, scale = a_step(19, 50, (75,), 2, dtype, "each", transposed=True)
    assert products.serves(x, *some)
    (found,) = products.products(x, some, which, scale)
    near(found, exact(x, some[0], which, scale), dtype, some)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("shape", "rank"), [((5, 70, 33), 1), ((67, 129, 66), 2), ((20, 64, 64), 4)], ids=str)
def test_a_gate_of_two_maps_is_its_formula_rounded_once(shape, rank, gate, dtype):
    slots, wide, out = shape
    x, (a, b), which, scale = a_step(slots, wide, (out, out), rank, dtype)
    wanted = GATES[gate](exact(x, a, which, scale)) * exact(x, b, which, scale)
    near(products.gated_product(x, [a, b], gate, which, scale), wanted, dtype)


@pytest.mark.parametrize("tile", products.TILES, ids=str)
def test_every_size_of_program_gives_the_same(tile, monkeypatch):
    monkeypatch.setattr(products, "TILES", (tile,))
    x, some, which, scale = a_step(70, 150, (70, 33), 1, torch.float32)
    for found, m in zip(products.products(x, some, which, scale), some, strict=True):
        near(found, exact(x, m, which, scale), torch.float32)
    wanted = GATES["silu"](exact(x, some[0], which, scale)) * exact(x, some[0], which, scale)
    near(products.gated_product(x, some[:1] * 2, "silu", which, scale), wanted, torch.float32)


def test_a_slot_that_is_not_displaced_has_the_plain_product():
    """Whatever its factors are; and so has each slot of a scale of 0."""
    x, (m,), which, scale = a_step(9, 70, (40,), 1, torch.float32)
    (found,) = products.products(x, [m], which, torch.zeros_like(scale))
    (other,) = products.products(x, [m._replace(u=m.u * 3)], which, torch.zeros_like(scale))
    assert torch.equal(found, other)
    near(found, x.double() @ m.w.double().t(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("wide", [70, 1030])
def test_a_look_up_has_each_slot_s_own_table(wide, rank, dtype):
    _, (m,), which, scale = a_step(7, wide, (33,), rank, dtype)
    ids = torch.tensor([0, 32, 5, 5, 31, 1, 2], device=DEVICE)
    found = products.rows(ids, m.w, m.u, m.v, which, scale)
    term = torch.einsum("sr,sdr->sd", m.u.double()[which.long(), ids], m.v.double()[which.long()])
    near(found, m.w.double()[ids] + scale.double()[:, None] * term, dtype)


@pytest.mark.parametrize(
    "changed", [{"rank": 5}, {"dtype": torch.float64}, {"outs": (1,)}, {"slots": 2, "wide": 1}], ids=str
)  # fmt: skip
def test_other_maps_are_left_to_others(changed):
    given = {"slots": 5, "wide": 70, "outs": (33,), "rank": 1, "dtype": torch.float32}
    x, maps, *_ = a_step(**given)
    assert products.serves(x, *maps)
    assert not products.serves(x.t().contiguous().t(), *maps)
    assert not products.serves(x.bfloat16(), *maps)
    x, maps, *_ = a_step(**given | changed)
    assert not products.serves(x, *maps) or changed.get("dtype") == torch.float64  # which `kernels_for` leaves out


def test_a_product_made_with_another_is_given_once_and_beside_its_own_bias(monkeypatch):
    monkeypatch.setattr(parts, "KERNEL_DEVICES", {DEVICE})
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(20, 12), "b": torch.nn.Linear(20, 12)}).to(DEVICE)
    a, b = model["a"], model["b"]
    weights = MemberWeights(Population(Directions([list(model.named_parameters())]), 0.1, 1), 2)
    weights.draw([(1, 1), (2, -1)])
    reads, x, launched = weights.reads([0, 1, -1]), drawn(3, 1, 20), []
    plain = products.products
    monkeypatch.setattr(
        products, "products", lambda x, maps, *rest: (launched.append(len(maps)), plain(x, maps, *rest))[1]
    )

    def wanted(weight, bias):
        return torch.stack([x[i] @ reads.copy(weight, i).t() + reads.stacks[id(bias)][i] for i in range(3)]).double()

    with torch.no_grad(), reads:
        a(two := drawn(3, 2, 20))  # a prompt shows who takes one x
        b(two)
        found = [a(x), b(x).clone()]
        b(x).zero_()
        found += [b(x), a(x), torch.nn.functional.linear(x, b.weight, a.bias)]
    right = [wanted(a.weight, a.bias), wanted(b.weight, b.bias)]
    for y, exactly in zip(found, [*right, *right[::-1], wanted(b.weight, a.bias)], strict=True):
        near(y, exactly, torch.float32)
    assert launched == [2, 1, 1, 2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 7, 64, 300, 1024])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_compiled_kernels_give_their_formula(slots, rank, dtype):
    """SmolLM2-135M's shapes, and odd ones; programs of every size are among them."""
    for wide, outs in [(576, (576, 192, 192)), (1536, (576,)), (576, (1536, 1536)), (91, (33, 17, 130))]:
        for bias in (None, "each"):
            x, some, which, scale = a_step(slots, wide, outs, rank, dtype, bias)
            assert products.serves(x, *some)
            wanted = [exact(x, m, which, scale) for m in some]
            for found, right in zip(products.products(x, some, which, scale), wanted, strict=True):
                near(found, right, dtype, some)
            if bias is None and len(outs) == 2:
                gated = products.gated_product(x, some, "silu", which, scale)
                near(gated, GATES["silu"](wanted[0]) * wanted[1], dtype)
    x, some, which, scale = a_step(slots, 576, (500,), rank, dtype)
    ids, (m,) = torch.arange(slots, device=DEVICE) * 17 % 500, some
    term = torch.einsum("sr,sdr->sd", m.u.double()[which.long(), ids], m.v.double()[which.long()])
    wanted_rows = m.w.double()[ids] + scale.double()[:, None] * term
    near(products.rows(ids, m.w, m.u, m.v, which, scale), wanted_rows, dtype)
    x, some, which, scale = a_step(slots, 576, (500,), rank, dtype, "all", transposed=True)
    near(products.products(x, some, which, scale)[0], exact(x, some[0], which, scale), dtype, some)
