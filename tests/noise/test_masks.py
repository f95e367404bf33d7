"""Which elements a random mask leaves out: the same on every backend, in any slice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune import noise
from zotune.directions import signed


def held(seed: int, backend) -> torch.Tensor:
    return torch.tensor([signed(seed)], dtype=torch.int64, device=backend.device)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    pid=st.integers(0, 2**32 - 1),
    start=st.integers(0, 5000) | st.sampled_from([2**33 + 1, 2**40 - 3]),
    count=st.integers(0, 3000),
    edge=st.integers(0, 2**32 - 1),
)
def test_backends_leave_out_the_same_elements(fast, reference, seed, pid, start, count, edge):
    got = fast.module.kept(count, held(seed, fast), pid, edge, start).cpu()
    assert torch.equal(got, reference.module.kept(count, held(seed, reference), pid, edge, start).cpu())


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**64 - 1),
    rows=st.lists(st.integers(0, 50_000), max_size=9),
    width=st.integers(1, 700),
    edge=st.integers(0, 2**32 - 1),
)
def test_rows_leave_out_what_the_whole_does(fast, reference, seed, rows, width, edge):
    for backend in (fast, reference):
        seed_1, rows_K = held(seed, backend), torch.tensor(rows, dtype=torch.int64, device=backend.device)
        got = backend.module.kept_rows(rows_K, width, seed_1, 77, edge).cpu()
        assert got.shape == (len(rows), width)
        for row, kept in zip(rows, got, strict=True):
            assert torch.equal(kept, backend.module.kept(width, seed_1, 77, edge, row * width).cpu())


def test_an_element_is_left_out_where_its_word_of_the_mask_stream_is_under_the_edge(backend):
    seed, pid, edge = 2**63 + 5, 0xDEADBEEF, 2**31
    got = backend.module.kept(40, held(seed, backend), pid, edge, 3).tolist()
    for i, kept in enumerate(got, start=3):
        words = noise.philox((i // 4, 0, pid, noise.Stream.MASK), (seed & 0xFFFFFFFF, seed >> 32))
        assert kept == (words[i % 4] >= edge)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.99])
def test_the_fraction_left_out_is_the_one_asked_for(sparsity):
    count = 200_000
    left_out = 1 - noise.kept(count, torch.tensor([9]), 77, sparsity).double().mean().item()
    assert abs(left_out - sparsity) <= 4.5 * math.sqrt(sparsity * (1 - sparsity) / count)
