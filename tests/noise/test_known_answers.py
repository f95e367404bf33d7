"""Definition 1, number by number. A change here is a change of NOISE_VERSION: old trajectories replay to other weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune import noise

# Random123, tests/kat_vectors, philox4x32 10: counter, key, words
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEED, PID = 0x0123456789ABCDEF, 0xC71EA125
word = st.integers(0, 2**32 - 1)
seed_64 = st.integers(0, 2**64 - 1)


def words_of_signs(z_128):
    """The four words whose bits 128 signs are."""
    bits = (z_128 < 0).long().view(4, 32)
    return tuple((bits << torch.arange(32)).sum(1).tolist())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert noise.philox(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_reference_gives_the_published_words(reference, counter, key, words):
    low, high, pid, stream = counter
    block = (low | high << 32) - (high >> 31 << 64)  # as int64
    seed = key[0] | key[1] << 32
    drawn = reference.module.words(torch.tensor([block]), seed, pid, stream)
    assert tuple(drawn[0].tolist()) == words


def test_the_first_signs_of_seed_and_parameter_zero_are_the_published_words(backend):
    assert words_of_signs(backend.z("rademacher", 0, 0, 0, 128)) == KNOWN[0][2]


@given(seed=seed_64, pid=word, block=st.integers(0, 2**55))
def test_signs_are_the_bits_of_philox(backend, seed, pid, block):
    z = backend.z("rademacher", seed, pid, 128 * block, 128 * block + 128)
    counter = (block & 0xFFFFFFFF, block >> 32, pid, noise.Stream.NOISE)
    assert words_of_signs(z) == noise.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


@given(seed=seed_64, pid=word, block=st.integers(0, 2**60))
def test_normals_are_box_muller_of_philox(backend, seed, pid, block):
    z = backend.z("gaussian", seed, pid, 4 * block, 4 * block + 4)
    counter = (block & 0xFFFFFFFF, block >> 32, pid, noise.Stream.NOISE)
    x = noise.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    expected = []
    for radius_word, turn_word in (x[:2], x[2:]):
        u, t = ((radius_word >> 8) + 1) * 2.0**-24, (turn_word >> 8) * 2.0**-24
        r = math.sqrt(-2 * math.log(u))
        expected += [r * math.cos(2 * math.pi * t), r * math.sin(2 * math.pi * t)]
    torch.testing.assert_close(z.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


# From plain integers and the math module alone; the second start is not a multiple of 4 and needs 64-bit offsets.
GOLDEN_NORMALS = {
    0: (0.6178709, -0.4313696, -0.6761422, 0.9139930, 0.1855639, 1.1980432, -0.1836677, -1.3148768),
    2**40 + 3: (-1.1992696, -0.6703306, -1.1465421, 0.2199046, 2.1222506, -0.3009884, -0.4559317, 1.5398907),
}
GOLDEN_SIGNS = {
    0: (0xC0B92809, 0xE72AD35F, 0x862472FD, 0x59F351E3),
    2**40 + 1: (0xC6A02AEE, 0xFB26C5F4, 0x1084E6C0, 0xC2234458),
}


@pytest.mark.parametrize("start", GOLDEN_NORMALS)
def test_golden_normals(backend, start):
    z = backend.z("gaussian", SEED, PID, start, start + 8)
    torch.testing.assert_close(z, torch.tensor(GOLDEN_NORMALS[start]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", GOLDEN_SIGNS)
def test_golden_signs(backend, block):
    assert words_of_signs(backend.z("rademacher", SEED, PID, 128 * block, 128 * block + 128)) == GOLDEN_SIGNS[block]


def test_golden_names_and_step_seeds():
    assert noise.NOISE_VERSION == 1
    assert noise.parameter_id("weight") == 2413773832
    assert noise.parameter_id("model.layers.0.self_attn.q_proj.weight") == PID
    assert noise.step_seed(0, 0) == 15519090891980219900
    assert noise.step_seed(42, 7, 3, 5) == 8374988263443789536
    assert noise.step_seed(-1, 2**32 - 1, 2**32 - 1, 2**32 - 1) == 3122246417205421253


@given(run_seed=seed_64, step=word, query=word, row=word)
def test_a_step_seed_is_two_words_of_its_own_counter(run_seed, step, query, row):
    words = noise.philox((step, query, row, noise.Stream.SEED), (run_seed & 0xFFFFFFFF, run_seed >> 32))
    assert noise.step_seed(run_seed, step, query, row) == words[0] | words[1] << 32
    assert noise.step_seed(run_seed - 2**64, step, query, row) == noise.step_seed(run_seed, step, query, row)


def test_step_query_and_row_are_told_apart():
    places = [(step, query, row) for step in range(8) for query in range(8) for row in range(8)]
    assert len({noise.step_seed(1, *place) for place in places}) == len(places)
