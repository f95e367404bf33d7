"""That z looks like independent draws. Seeds are fixed, so nothing is flaky; each bound is five standard errors.

Drawn on the CPU backend: the other backends draw the same z (test_laws), Triton's interpreter too slowly for this.
"""

from __future__ import annotations

import math

import pytest
import torch

from zotune import noise

N = 1 << 20
FIVE_SIGMA = 5 / math.sqrt(N)
PID = noise.parameter_id("model.layers.0.mlp.up_proj.weight")

pytestmark = pytest.mark.parametrize("fast", ["cpu"], indirect=True)


def correlation(a, b):
    return (a.double() * b.double()).mean().abs().item()  # of draws with mean 0 and variance 1


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_normals_have_the_moments_of_the_normal_distribution(fast, seed):
    z = fast.z("gaussian", seed, PID, 0, N).double()
    # E zᵏ and the standard deviation of zᵏ
    for k, mean, sd in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((z**k).mean().item() - mean) <= sd * FIVE_SIGMA, f"moment {k}"


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_normals_follow_the_normal_distribution_function(fast, seed):
    """Kolmogorov–Smirnov; √N·D passes 2.3 with a probability of 5e-5."""
    z = fast.z("gaussian", seed, PID, 0, N).double().sort().values
    ranks = torch.arange(N, dtype=torch.float64) / N
    distance = (torch.special.ndtr(z) - ranks).abs().max().item()
    assert distance * math.sqrt(N) < 2.3


def test_tails_reach_as_far_as_24_bits_allow(fast):
    """P(|z| > 4) = 6.3e-5; nothing lies beyond √(−2 ln 2⁻²⁴) = 5.77."""
    z = fast.z("gaussian", 3, PID, 0, 4 * N).abs()
    expected = 4 * N * math.erfc(4 / math.sqrt(2))
    assert abs((z > 4).sum().item() - expected) < 5 * math.sqrt(expected)
    assert z.max() < 5.78


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_each_bit_of_a_block_is_a_fair_sign(fast, seed):
    z = fast.z("rademacher", seed, PID, 0, 128 * 8192).view(8192, 128)
    assert (z.mean(0).abs() <= 5 / math.sqrt(8192)).all()
    assert abs(z.mean().item()) <= FIVE_SIGMA
    assert z.abs().eq(1).all()


@pytest.mark.parametrize("direction", noise.DIRECTIONS)
def test_seeds_parameters_and_places_are_uncorrelated(fast, direction):
    z = fast.z(direction, 7, PID, 0, N)
    others = {
        "the next seed": fast.z(direction, 8, PID, 0, N),
        "a seed that differs in its high word": fast.z(direction, 7 + 2**32, PID, 0, N),
        "the next parameter": fast.z(direction, 7, PID + 1, 0, N),
        "the same parameter 2³² blocks on": fast.z(direction, 7, PID, 2**39, 2**39 + N),
    }
    for name, other in others.items():
        assert correlation(z, other) <= FIVE_SIGMA, name
    for lag in (1, 2, 3, 4, 31, 32, 127, 128, 576):
        assert correlation(z[lag:], z[:-lag]) <= 5 / math.sqrt(N - lag), f"lag {lag}"


def test_the_two_normals_of_a_pair_are_independent_in_size_too(fast):
    """Box–Muller's halves share a radius: their squares must be uncorrelated all the same. Var((z²−1)(y²−1)) = 4."""
    z = fast.z("gaussian", 7, PID, 0, 2 * N).double().view(-1, 2) ** 2 - 1
    assert abs((z[:, 0] * z[:, 1]).mean().item()) <= 2 * FIVE_SIGMA


def test_steps_of_a_run_draw_uncorrelated_directions(fast):
    zs = torch.stack([fast.z("gaussian", noise.step_seed(0, step), PID, 0, N // 16) for step in range(16)]).double()
    gram = zs @ zs.t() / (N // 16)
    assert (gram - torch.eye(16)).abs().max() <= math.sqrt(2) * 4 * FIVE_SIGMA
