"""Tokens are drawn with the probabilities that logits say, by draws that depend on seed, step, prompt row and position alone."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from zotune import noise
from zotune.decode import Settings
from zotune.decode.choosing import Draws, choose, draw_seeds


def drawn(logits_V: torch.Tensor, settings: Settings, count: int) -> torch.Tensor:
    """(count,): tokens of as many positions."""
    logits_SV = logits_V.expand(count, -1)
    seeds_S = draw_seeds(3, 5, [7], count)[0]
    return choose(logits_SV, settings, Draws(torch.empty(logits_SV.shape)).draw(seeds_S))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    """Chi-square of 40,000 draws over 24 tokens: under its 1 − 1e-4 quantile of 23 degrees of freedom, 59."""
    logits_V = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = torch.bincount(drawn(logits_V, Settings(1, temperature), 40_000), minlength=24).double()
    expected = (logits_V.double() / temperature).softmax(0) * 40_000
    assert float(((counts - expected).square() / expected).sum()) < 59


def test_top_k_and_top_p_leave_what_transformers_leaves():
    logits_SV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    flat = torch.zeros_like(logits_SV)
    for k, p in [(None, 0.7), (5, None), (12, 0.5), (None, 0.999), (1, None), (None, 1e-6), (80, 1.0)]:
        wanted = logits_SV / 0.9
        for warper, limit in ((TopKLogitsWarper, k), (TopPLogitsWarper, p)):
            wanted = wanted if limit is None else warper(limit)(None, wanted)
        left = wanted > -torch.inf
        found = torch.zeros_like(left)
        for token in range(50):  # each token wins by a noise of its own if it is among those that are left
            noise_SV = flat.clone()
            noise_SV[:, token] = 1e4
            found[:, token] = choose(logits_SV, Settings(1, 0.9, k, p), noise_SV) == token
        assert torch.equal(found, left), (k, p)


def test_temperature_0_takes_the_likeliest():
    logits_SV = torch.randn(4, 9)
    assert torch.equal(choose(logits_SV, Settings(1)), logits_SV.argmax(-1))


def test_the_seed_of_a_draw_is_philox_of_seed_step_row_and_position():
    seed = (5 << 40) + 11
    found = draw_seeds(seed, step=9, rows_R=[0, 1000], positions=4)
    for r, row in enumerate([0, 1000]):
        for position in range(4):
            low, high, _, _ = noise.philox(
                (position, row, 9, noise.Stream.SAMPLE), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
            )
            assert int(found[r, position]) % (1 << 64) == low | high << 32


def test_draws_differ_by_seed_step_row_and_position():
    seeds = {int(s) for seed in (0, 1) for step in (0, 1) for s in draw_seeds(seed, step, [0, 1], 3).flatten()}
    assert len(seeds) == 2 * 2 * 2 * 3


def test_like_logits_mostly_draw_the_same_token():
    """Under the same noise two members part no more often than twice their total variation; drawn apart they mostly would."""
    logits_V = torch.randn(200, generator=torch.Generator().manual_seed(2))
    near_V = logits_V + 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(3))
    apart = (drawn(logits_V, Settings(1, 1.0), 4000) != drawn(near_V, Settings(1, 1.0), 4000)).double().mean()
    variation = 0.5 * (logits_V.softmax(0) - near_V.softmax(0)).abs().sum()
    assert 0 < float(apart) <= 2 * float(variation) + 0.01


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**{"max_new_tokens": 4} | bad)
