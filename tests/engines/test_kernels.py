"""The two kernels of a low-rank product, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shapes, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize(("which", "rows", "wide", "rank"), [([1, 0, 1, 2], 5, 700, 1), ([0, 0], 33, 64, 3)], ids=str)
def test_one_read_of_x_serves_every_weight_that_takes_it(readers, which, rows, wide, rank):
    from zotune.engines.kernels import low_rank_inner

    parts, directions = len(which), max(which) + 1
    x, scale, *ins = drawn((parts, rows, wide), (parts,), *[(directions, wide, rank)] * readers)
    t = low_rank_inner(x, ins, torch.tensor(which, dtype=torch.int32, device=DEVICE), scale)
    for ours, a in zip(t, ins, strict=True):
        wanted = scale[:, None, None] * torch.bmm(x, a[which])
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_of", [None, "all", "each"])
@pytest.mark.parametrize(
    ("which", "rows", "out", "rank"),
    [([1, 0, 1, 2], 5, 300, 1), ([0, 0], 33, 999, 3), ([1, 0, 2], 1, 1500, 2)],
    ids=str,
)
def test_what_a_product_is_added_to_is_the_low_rank_term_and_the_bias(which, rows, out, rank, bias_of, dtype):
    from zotune.engines.kernels import low_rank_outer

    parts = len(which)
    (t,) = drawn((parts, rows, rank))
    b, shared, own = drawn((max(which) + 1, out, rank), (out,), (parts, out), dtype=dtype)
    bias = {None: None, "all": shared, "each": own}[bias_of]
    wanted = torch.bmm(t, b.float()[which].transpose(1, 2))
    if bias is not None:
        wanted = wanted + bias.float().expand(parts, out)[:, None]
    torch.testing.assert_close(
        low_rank_outer(t, b, torch.tensor(which, dtype=torch.int32, device=DEVICE), bias, dtype),
        wanted.to(dtype),
        rtol=torch.finfo(dtype).eps,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "rows", "wide"), [(3, 5, 300), (1, 40, 17)])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_layer_norm_has_each_part_s_scale_and_shift(parts, rows, wide, dtype, shifted):
    from zotune.engines.kernels import layer_norm

    x, scale, shift = drawn((parts, rows, wide), (parts, wide), (parts, wide), dtype=dtype)
    wanted = torch.nn.functional.layer_norm(x.double(), (wide,)) * scale.double()[:, None]
    wanted = wanted + shift.double()[:, None] if shifted else wanted
    ours = layer_norm(x, scale, shift if shifted else None, 1e-5)
    torch.testing.assert_close(ours.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "rows", "wide"), [(3, 5, 300), (1, 40, 17)])
@pytest.mark.parametrize("own", [True, False])
def test_a_shift_is_each_part_s_own_or_all_of_theirs(parts, rows, wide, dtype, own):
    from zotune.engines.kernels import add_shift

    y, each, shared = drawn((parts, rows, wide), (parts, wide), (wide,), dtype=dtype)
    shift = each if own else shared
    wanted = y.float() + shift.float().expand(parts, wide)[:, None]
    add_shift(y, shift)
    torch.testing.assert_close(y.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "wide", "groups", "rank"), [(100, 300, 1, 1), (65, 130, 16, 2), (65, 130, 24, 2)])
def test_a_fold_is_the_sum_rounded_once(out, wide, groups, rank, dtype):
    from zotune.engines.fold_kernels import fold

    draw = torch.Generator().manual_seed(0)
    w, u, v = (
        torch.randn(*s, generator=draw).to(DEVICE, dtype)
        for s in ((out, wide), (groups, out, rank), (groups, wide, rank))
    )
    scales = torch.randn(groups, generator=draw).to(DEVICE) / 10
    moved = torch.einsum("g,gor,gdr->od", scales.double(), u.double(), v.double())
    ours = w.clone()
    fold(ours, u, v, scales)
    off = (ours.double() - (w.double() + moved)).abs()
    # rounded once: half a unit in the last place (the interpreter truncates to 16 bits), and what the factors' bits lose
    half = torch.finfo(dtype).eps / (2 if DEVICE == "cuda" else 1)
    lost = {torch.float32: 1e-6, torch.bfloat16: 2e-5, torch.float16: 2e-3}[dtype]
    assert bool((off <= half * ours.double().abs() + lost * moved.abs().max()).all())
    fold(ours := w.clone(), u, v, torch.zeros_like(scales))
    assert torch.equal(ours, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "rows", "wide", "offset"), [(3, 5, 300, 0.0), (1, 40, 17, 1.0)])
def test_an_rms_norm_has_each_part_s_scale(parts, rows, wide, offset, dtype):
    from zotune.engines.kernels import rms_norm

    x, scale = drawn((parts, rows, wide), (parts, wide), dtype=dtype)
    wanted = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    wanted *= scale.double()[:, None] + offset
    ours = rms_norm(x, scale, 1e-5, offset)
    torch.testing.assert_close(ours.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("groups", [5, 20])  # few terms, and many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_folds_in_a_pass_are_the_folds_one_by_one(dtype, groups):
    from zotune.engines.fold_kernels import fold, folds

    draw = torch.Generator().manual_seed(0)
    steps, rank = 7, 2
    w, u, v = (
        torch.randn(*s, generator=draw).to(DEVICE, dtype)
        for s in ((70, 140), (steps * groups, 70, rank), (steps * groups, 140, rank))
    )
    scales = torch.randn(steps, groups, generator=draw).to(DEVICE) / 10
    scales[3] = 0  # a step that was skipped
    one_by_one = w.clone()
    for u_GNR, v_GDR, scales_G in zip(u.split(groups), v.split(groups), scales, strict=True):
        fold(one_by_one, u_GNR.contiguous(), v_GDR.contiguous(), scales_G)
    before = w.clone()
    folds(w, u, v, scales)
    assert torch.equal(w, one_by_one)
    assert not torch.equal(w, before)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [3, 20])
def test_folds_of_many_matrices_in_one_launch_are_the_folds_one_by_one(groups, dtype, compensated, even):
    from zotune.engines.fold_kernels import Fold, FoldMany, fold

    sides = [(32, 144), (80, 16), (64, 128)] if even else [(33, 144), (80, 17), (1, 5)]
    (scales,), many = drawn((groups,)), FoldMany()
    scales[1] = 0
    for seed in range(2):  # the second finds its tables
        some, wanted = [], []
        for out, wide in sides:
            w, u, v, lost = drawn((out, wide), (groups, out, 1), (groups, wide, 1), (out, wide), dtype=dtype)
            some.append(Fold(w + seed, u, v, lost / 100 if compensated else None))
            alone = some[-1].matrix_ND.clone(), None if not compensated else (lost / 100).clone()
            fold(alone[0], u, v, scales, alone[1])
            wanted.append(alone)
        assert even <= all(one.even for one in some)
        many.run(some, scales)
        for one, (matrix, lost) in zip(some, wanted, strict=True):
            assert torch.equal(one.matrix_ND, matrix)
            assert lost is None or torch.equal(one.lost_ND, lost)
            assert not torch.equal(one.matrix_ND, drawn(matrix.shape, dtype=dtype)[0] + seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_compensated_folds_add_up_where_rounded_ones_are_lost(dtype, by):
    from zotune.engines import fold_kernels, folding

    fold = fold_kernels.fold if by == "kernel" else folding._fold
    w, u, v = drawn((70, 140), (3, 70, 2), (3, 140, 2), dtype=dtype)
    scales = torch.full((3,), 1e-5, device=DEVICE)
    wanted, rounded, kept, lost = w.double(), w.clone(), w.clone(), torch.zeros_like(w)
    for _ in range(60):
        wanted += torch.einsum("g,gor,gdr->od", scales.double(), u.double(), v.double())
        fold(rounded, u, v, scales)
        fold(kept, u, v, scales, lost)
    off, rough = (float((x - wanted).abs().mean()) for x in (kept.double() + lost.double(), rounded.double()))
    assert off < rough / 20
    before, rest = kept.clone(), lost.clone()
    fold(kept, u, v, torch.zeros_like(scales), lost)
    assert torch.equal(kept, before)
    assert torch.equal(lost, rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(8, 8, 2), (1, 8, 8, 3, 1), (40, 5)])
def test_folds_of_any_lengths_in_few_passes_are_the_folds_one_by_one(lengths, dtype, monkeypatch):
    """A run's last fold is short, and so is one after skipped steps: few terms are summed otherwise than many."""
    from zotune import ZeroOrderOptimizer
    from zotune.directions import Displacement
    from zotune.engines import parts

    monkeypatch.setattr(parts, "KERNEL_DEVICES", {"cuda", "cpu"})
    torch.manual_seed(0)
    models = [torch.nn.Linear(70, 90).to(DEVICE, dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = models[0].weight.detach().clone()
    whole, single = (ZeroOrderOptimizer(m, engine="lowrank").engine.writer for m in models)
    draw, moves = torch.Generator().manual_seed(1), []
    for i, length in enumerate(lengths):
        coefs = (torch.randn(length, generator=draw) / 30).tolist()
        moves.append(Displacement(tuple(range(100 * i, 100 * i + length)), (tuple(coefs),)))
    whole.apply_each(moves, max(lengths))
    for by in moves:
        single.apply(by, max(lengths))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(models[0].weight, start)
