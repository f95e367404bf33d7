"""The two kernels of a low-rank product, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("parts", "groups", "rows", "width", "out", "rank"), [(4, 2, 5, 700, 300, 1), (2, 1, 33, 64, 999, 3)]
)
def test_a_low_rank_product_is_the_one_written_down(parts, groups, rows, width, out, rank):
    from zotune.engines.kernels import add_low_rank

    draw = torch.Generator().manual_seed(0)
    x, y, a, b, scale = (
        torch.randn(*shape, generator=draw).to(DEVICE)
        for shape in ((parts, rows, width), (parts, rows, out), (groups, width, rank), (groups, out, rank), (parts,))
    )
    again = (t.repeat(parts // groups, 1, 1).double() for t in (a, b))
    inner, outer = (t for t in again)
    wanted = y + scale[:, None, None] * torch.bmm(torch.bmm(x.double(), inner), outer.transpose(1, 2))
    add_low_rank(y, x, a, b, scale)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "rows", "wide"), [(3, 5, 300), (1, 40, 17)])
def test_scales_and_shifts_are_each_part_s_own(parts, rows, wide, dtype):
    from zotune.engines.kernels import affine

    draw = torch.Generator().manual_seed(0)
    y, scale, shift = (
        torch.randn(*s, generator=draw).to(DEVICE, dtype) for s in ((parts, rows, wide), (parts, wide), (wide,))
    )
    wanted = y.float() * scale.float()[:, None] + shift.float()
    affine(y, scale, shift)
    torch.testing.assert_close(y.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "wide", "groups", "rank"), [(100, 300, 1, 1), (65, 130, 16, 2)])
def test_a_fold_is_the_sum_rounded_once(out, wide, groups, rank, dtype):
    from zotune.engines.kernels import fold

    draw = torch.Generator().manual_seed(0)
    w, u, v = (
        torch.randn(*s, generator=draw).to(DEVICE, dtype)
        for s in ((out, wide), (groups, out, rank), (groups, wide, rank))
    )
    scales = torch.randn(groups, generator=draw).to(DEVICE) / 10
    moved = torch.einsum("g,gor,gdr->od", scales.double(), u.double(), v.double())
    ours = w.clone()
    fold(ours, u, v, scales)
    loose = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(ours.double(), w.double() + moved, rtol=loose, atol=loose)
    fold(ours := w.clone(), u, v, torch.zeros_like(scales))
    assert torch.equal(ours, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_folds_in_a_pass_are_the_folds_one_by_one(dtype):
    from zotune.engines.kernels import fold, folds

    draw = torch.Generator().manual_seed(0)
    steps, groups, rank = 7, 5, 2
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
