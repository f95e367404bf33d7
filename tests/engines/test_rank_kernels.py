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
    from zotune.engines.rank_kernels import add_low_rank

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
