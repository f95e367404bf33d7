"""What holds for every backend, shape, dtype and order. Bits are compared wherever bits are promised."""

# Q pairs, K rows.

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = [0, 1, 127, 128, 129, 1021, 2049]
sizes = st.sampled_from(SIZES) | st.integers(0, 5000)
seed_64 = st.integers(0, 2**64 - 1)
pids = st.integers(0, 2**32 - 1)
starts = st.sampled_from([0, 1, 3, 127, 2047, 2**31 - 5, 2**33 + 1]) | st.integers(0, 2**40)
directions = st.sampled_from(["gaussian", "rademacher"])
SEEDS, COEFS, PID = (2**64 - 3, 17, 2**40 + 1), (0.5, -1.25e-3, 3.0), 0x9ABCDEF0
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a, b):
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def weights(shape, dtype, device, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def sum_in_order(backend, n, direction, start=0, wide=torch.float32):
    """Σ_q c_q·z_q from the backend's own z, each operation of it rounded once."""
    total = torch.zeros(n, dtype=wide)
    for seed, coef in zip(SEEDS, COEFS, strict=True):
        total += torch.tensor(coef, dtype=wide) * backend.z(direction, seed, PID, start, start + n).to(wide)
    return total


@given(direction=directions, seed=seed_64, pid=pids, start=starts, n=sizes, data=st.data())
def test_shards_draw_the_noise_of_the_whole(backend, direction, seed, pid, start, n, data):
    k = data.draw(st.integers(0, n))
    parts = [
        backend.z(direction, seed, pid, start, start + k),
        backend.z(direction, seed, pid, start + k, start + n),
    ]
    assert torch.equal(torch.cat(parts), backend.z(direction, seed, pid, start, start + n))


@given(seed=seed_64, pid=pids, start=starts, n=sizes)
def test_every_backend_draws_the_signs_of_the_reference(fast, reference, seed, pid, start, n):
    expected = reference.z("rademacher", seed, pid, start, start + n)
    assert torch.equal(fast.z("rademacher", seed, pid, start, start + n), expected)


@given(seed=seed_64, pid=pids, start=starts, n=sizes)
def test_every_backend_draws_the_normals_of_the_reference(fast, reference, seed, pid, start, n):
    expected = reference.z("gaussian", seed, pid, start, start + n)
    torch.testing.assert_close(fast.z("gaussian", seed, pid, start, start + n), expected, rtol=0, atol=1e-6)


def test_small_radii_are_as_exact_relative_to_themselves_as_large_ones(fast, reference):
    """r = √(−2 ln u) near u = 1 is where an ln of small absolute error fails: four roundings of 2⁻²⁴ and one of r."""
    n = 1 << (15 if fast.interpreted else 20)
    z, expected = (b.z("gaussian", 5, PID, 0, n).double().view(-1, 2) for b in (fast, reference))
    radius = expected.norm(dim=1, keepdim=True)
    assert radius.min() < 0.02
    assert ((z - expected).abs() <= 5 * 2.0**-24 * radius).all()


@pytest.mark.parametrize("n", SIZES)
def test_in_place_equals_out_of_place(backend, direction, dtype, n):
    w = weights(n, dtype, backend.device)
    out = backend.add(w, SEEDS, COEFS, PID, direction, 5)
    assert not out.isnan().any()
    backend.add(w, SEEDS, COEFS, PID, direction, 5, out=w)
    assert same_bits(w, out)


def test_w_is_only_read(backend, direction, dtype):
    w = weights(1021, dtype, backend.device)
    before = w.clone()
    backend.add(w, SEEDS, COEFS, PID, direction)
    assert same_bits(w, before)


def test_nothing_beside_out_is_written(backend, direction, dtype):
    """Tiles and chunks reach past both ends of a shard; the stores must not."""
    whole = torch.full((3000,), 7.0, dtype=dtype, device=backend.device)
    w = weights(1021, dtype, backend.device)
    backend.add(w, SEEDS, COEFS, PID, direction, 129, out=whole[1000:2021])
    assert (whole[:1000] == 7).all()
    assert (whole[2021:] == 7).all()
    assert same_bits(whole[1000:2021], backend.add(w, SEEDS, COEFS, PID, direction, 129))


@pytest.mark.parametrize("coefs", [(), (0.0,), (0.0, -0.0, 0.0)])
def test_zero_coefficients_leave_every_bit(backend, direction, dtype, coefs):
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny / 2, -tiny / 2, torch.finfo(dtype).max]
    w = torch.tensor(special * 17, dtype=torch.float64).to(dtype).to(backend.device)
    seeds = SEEDS[: len(coefs)]
    assert same_bits(backend.add(w, seeds, coefs, PID, direction), w)
    rows = torch.tensor([3, 0], device=backend.device)
    table = w.view(-1, 8)
    assert same_bits(backend.add_rows(table, rows, seeds, coefs, PID, direction), table[rows])
    kept = w.clone()
    backend.add(w, seeds, coefs, PID, direction, out=w)
    assert same_bits(w, kept)


def test_a_pair_with_coefficient_zero_adds_nothing(backend, direction, dtype):
    w = weights(1021, dtype, backend.device)
    padded = backend.add(w, (9, SEEDS[0], 8), (0.0, 0.5, 0.0), PID, direction)
    assert same_bits(padded, backend.add(w, SEEDS[:1], (0.5,), PID, direction))


def skip_bfloat16_in_the_interpreter(backend, dtype):
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip(
            "Triton's interpreter cuts float32 to bfloat16 where the GPU rounds; benchmarks/noise.py checks the GPU"
        )


def test_the_sum_follows_the_order_of_pairs_and_is_rounded_once(backend, direction, dtype):
    """Bit for bit: float32 (float64 for float64) sums, then one rounding to nearest even."""
    if backend.fuses and direction == "gaussian":
        pytest.skip("a GPU fuses c·z into the sum")
    skip_bfloat16_in_the_interpreter(backend, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for scale in (1e-6, 1.0, 300.0):
        w = weights(4099, dtype, backend.device, scale)
        expected = (w.cpu().to(wide) + sum_in_order(backend, 4099, direction, 3, wide)).to(dtype)
        assert same_bits(backend.add(w, SEEDS, COEFS, PID, direction, 3).cpu(), expected)


# Half an ulp of the result, and float32's rounding of Q products and Q + 1 sums (float64's for float64; z itself to 1e-6).
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


def test_the_sum_is_near_that_of_the_reference_in_float64(fast, reference, direction, dtype):
    skip_bfloat16_in_the_interpreter(fast, dtype)
    w = weights(4099, dtype, fast.device)
    out = fast.add(w, SEEDS, COEFS, PID, direction, 3).cpu().double()
    terms = torch.stack(
        [c * reference.z(direction, s, PID, 3, 3 + 4099).double() for s, c in zip(SEEDS, COEFS, strict=True)]
    )
    exact = w.cpu().double() + terms.sum(0)
    from_z = 0 if direction == "rademacher" else 1e-6 * sum(map(abs, COEFS))
    sums = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    size = w.cpu().double().abs() + terms.abs().sum(0)
    bound = HALF_ULP[dtype] * exact.abs() + len(COEFS) * sums * size + from_z * (1 + HALF_ULP[dtype])
    assert ((out - exact).abs() <= bound).all()


def test_float64_coefficients_are_used_in_full(backend):
    w = torch.zeros(127, dtype=torch.float64, device=backend.device)
    coef = 0.1 + 2.0**-50
    assert backend.add(w, (3,), (coef,), PID, "rademacher").abs().eq(coef).all()


def test_rounding_is_to_nearest_even_and_to_infinity(backend):
    """Ties, subnormals, overflow and NaN, against torch's own conversion; ±1 times 2⁻ᵏ adds exactly."""
    for dtype in (torch.float16,) if backend.interpreted else (torch.bfloat16, torch.float16):
        w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(backend.device)
        for coef in (2.0**-9, 2.0**-25, 2.0**-12 + 2.0**-30, 16.0):
            z = backend.z("rademacher", 3, PID, 0, w.numel())
            expected = (w.cpu().float() + coef * z).to(dtype)
            out = backend.add(w, (3,), (coef,), PID, "rademacher").cpu()
            assert torch.equal(out.isnan(), expected.isnan())
            number = ~expected.isnan()
            assert same_bits(out[number], expected[number])


@settings(max_examples=30)
@given(direction=directions, width=st.sampled_from([1, 3, 64, 127, 129, 576]), data=st.data())
def test_rows_are_slices_of_the_whole(backend, direction, width, data):
    rows = data.draw(st.lists(st.integers(0, 10), max_size=6))
    dtype = data.draw(st.sampled_from(list(BITS)))
    w = weights((11, width), dtype, backend.device)
    index = torch.tensor(rows, dtype=torch.int64, device=backend.device)
    whole = backend.add(w, SEEDS, COEFS, PID, direction)
    assert same_bits(backend.add_rows(w, index, SEEDS, COEFS, PID, direction), whole[index])


def test_rows_of_three_dimensions_and_of_a_transposed_table(backend, direction):
    rows = torch.tensor([4, 4, 0], device=backend.device)
    for w in (weights((5, 3, 7), torch.float32, backend.device), weights((9, 5), torch.float32, backend.device).t()):
        whole = backend.add(w.contiguous(), SEEDS, COEFS, PID, direction)
        assert same_bits(backend.add_rows(w, rows, SEEDS, COEFS, PID, direction), whole[rows])


@settings(max_examples=30)
@given(direction=directions, width=st.sampled_from([1, 3, 64, 127, 129, 576]), data=st.data())
def test_rows_that_lie_anywhere_are_slices_of_the_whole(backend, direction, width, data):
    starts = data.draw(st.lists(st.integers(0, 5000), max_size=6))
    dtype = data.draw(st.sampled_from(list(BITS)))
    w = weights((6000,), dtype, backend.device)
    whole = backend.add(w, SEEDS, COEFS, PID, direction)
    at_KD = torch.tensor(starts, dtype=torch.int64).view(-1, 1) + torch.arange(width)
    held, starts_K = w[at_KD.to(backend.device)], at_KD[:, 0].to(backend.device)
    out, wide = torch.full_like(held, math.nan), torch.float64 if dtype == torch.float64 else torch.float32
    for into in (out, held):  # in place too
        backend.module.add_noise_at(into, held, starts_K, *backend.pairs(SEEDS, COEFS, wide), PID, direction)
        assert same_bits(into, whole[at_KD])


VIEWS = {
    "transposed": lambda w: w.view(41, 29).t(),
    "permuted": lambda w: w.view(41, 29, 1).permute(2, 1, 0),
    "every other": lambda w: w[::2],
    "scalar": lambda w: w[0],
    "one column": lambda w: w.view(41, 29)[:, 3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_elements_count_in_row_major_order_of_the_logical_tensor(backend, direction, dtype, view):
    w = view(weights(41 * 29, dtype, backend.device))
    flat = backend.add(w.reshape(-1).clone(), SEEDS, COEFS, PID, direction, 6)
    assert same_bits(backend.add(w, SEEDS, COEFS, PID, direction, 6).reshape(-1), flat)
    fresh = torch.empty(w.shape, dtype=dtype, device=w.device)  # contiguous
    assert same_bits(backend.add(w, SEEDS, COEFS, PID, direction, 6, out=fresh).reshape(-1), flat)
    backend.add(w, SEEDS, COEFS, PID, direction, 6, out=w)
    assert same_bits(w.reshape(-1), flat)


def test_a_parameter_that_requires_grad_is_taken_as_data(backend, direction):
    w = torch.nn.Parameter(weights(127, torch.float32, backend.device))
    out = torch.empty(127, device=backend.device)
    backend.add(w, SEEDS, COEFS, PID, direction, out=out)
    assert same_bits(out, backend.add(w.data, SEEDS, COEFS, PID, direction))
    assert w.grad is None


def test_torchs_generator_is_neither_read_nor_moved(backend, direction):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = backend.z(direction, 1, PID, 0, 129)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(backend.z(direction, 1, PID, 0, 129), a)


@pytest.mark.parametrize("fast", ["cpu"], indirect=True)
def test_the_number_of_threads_changes_no_bit(fast, direction, dtype):
    w = weights(400_003, dtype, fast.device)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(fast.add(w, SEEDS, COEFS, PID, direction, 77))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(outs[0], outs[1])
    assert same_bits(outs[0], outs[2])


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_seeds_and_coefficients(direction):
    from zotune.noise import cuda

    w = weights(4099, torch.bfloat16, "cuda")
    seeds, coefs = torch.tensor([1, 2], device="cuda"), torch.tensor([0.5, 0.0], device="cuda")
    out = torch.empty_like(w)
    cuda.add_noise(out, w, seeds, coefs, PID, direction)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.add_noise(out, w, seeds, coefs, PID, direction)
    for new_seeds, new_coefs in (([7, -8], [0.25, -3.0]), ([7, -8], [0.0, 0.0])):
        seeds.copy_(torch.tensor(new_seeds))
        coefs.copy_(torch.tensor(new_coefs))
        graph.replay()
        expected = torch.empty_like(w)
        cuda.add_noise(expected, w, seeds, coefs, PID, direction)
        assert same_bits(out, expected)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31(direction):
    from zotune.noise import cuda

    n = 2**31 + 4096
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    pair = torch.tensor([5], device="cuda"), torch.tensor([1.0], device="cuda")
    cuda.add_noise(w, w, *pair, PID, direction)
    tail = torch.zeros(8192, dtype=torch.bfloat16, device="cuda")
    cuda.add_noise(tail, tail, *pair, PID, direction, n - 8192)
    assert same_bits(w[-8192:], tail)
