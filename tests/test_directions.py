"""Displacements of named parameters: what shares a launch on CUDA has the bits of each alone."""

from __future__ import annotations

import copy

import torch

from zotune.directions import Directions, Displacement


def test_small_compensated_parameters_share_a_launch_and_keep_their_bits():
    """What `apply_compensated` gives on CUDA in one launch is what each gives alone: 16 bits, two groups, a large one left."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (96, 7, 512)]
    params.append(torch.nn.Parameter(torch.randn(1025, 1024).bfloat16()))
    lost = [torch.zeros_like(p.data) for p in params]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    directions = Directions([named[:2], named[2:]], "gaussian")
    by = Displacement((5, 6, 7), ((0.1, -0.2, 0.3), (0.05, 0.0, 0.1)))
    others, rests = copy.deepcopy(params), copy.deepcopy(lost)
    factors = [torch.tensor(1.0), torch.tensor(0.5)]
    left = directions._compensate_few([(p, r) for p, r in zip(params, lost, strict=True)], by, factors)
    assert [p.numel() for p, _ in left] == [1025 * 1024]
    twin = Directions([[("p0", others[0]), ("p1", others[1])], [("p2", others[2]), ("p3", others[3])]], "gaussian")
    twin.apply_compensated(by, rests, factors)
    for i in range(3):
        assert torch.equal(params[i], others[i])
        assert torch.equal(lost[i], rests[i])
        assert lost[i].any()
