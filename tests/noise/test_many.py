"""Several copies or tensors in one pass are what `add_noise` gives one by one."""

from __future__ import annotations

import pytest
import torch

from zotune import noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(ours: torch.Tensor, theirs: torch.Tensor, backend) -> None:
    """Bits, but for one rounding where c·z and the sum are fused or the interpreter truncates 16-bit stores."""
    loose = backend.fuses or backend.interpreted
    tolerance = 2 * torch.finfo(ours.dtype).eps if loose else 0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", noise.DIRECTIONS)
@pytest.mark.parametrize(("n", "start"), [(5000, 0), (777, 333), (1, 2049)])
def test_both_copies_are_the_two_displacements(backend, direction, dtype, n, start):
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype).to(backend.device)
    seed, coef = backend.pairs([3 << 62], [0.37])
    plus, minus = torch.empty_like(w), torch.empty_like(w)
    backend.module.add_noise_both(plus, minus, w, seed, coef, 99, direction, start)
    close(plus, backend.add(w, [3 << 62], [0.37], 99, direction, start), backend)
    close(minus, backend.add(w, [3 << 62], [-0.37], 99, direction, start), backend)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("direction", noise.DIRECTIONS)
@pytest.mark.parametrize(("n", "start", "pairs"), [(5000, 0, 1), (777, 333, 3), (1, 2049, 1)])
def test_both_copies_are_of_the_weights_after_the_update_that_comes_first(backend, direction, dtype, n, start, pairs):
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype).to(backend.device)
    update = backend.pairs(range(5, 5 + pairs), [0.21, -1.5, 0.33][:pairs])
    wanted, ours = w.clone(), w.clone()
    backend.module.add_noise(wanted, wanted, *update, 99, direction, start)
    assert not torch.equal(wanted, w)
    seed, coef = backend.pairs([3 << 62], [0.37])
    copies = [torch.full((2, n), torch.nan, dtype=dtype, device=backend.device) for _ in range(2)]
    backend.module.add_noise_both(*copies[0], ours, seed, coef, 99, direction, start, update)
    assert torch.equal(ours, wanted)
    backend.module.add_noise_both(*copies[1], wanted, seed, coef, 99, direction, start)
    assert torch.equal(*copies)
    zeros = update[0], torch.zeros_like(update[1])
    backend.module.add_noise_both(*copies[0], ours, seed, coef, 99, direction, start, zeros)
    assert torch.equal(ours, wanted)
    assert torch.equal(*copies)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("direction", noise.DIRECTIONS)
def test_rows_are_of_the_weights_after_the_update_and_the_weights_stay(backend, direction, dtype):
    w = torch.randn(9, 130, generator=torch.Generator().manual_seed(0)).to(dtype).to(backend.device)
    before, wanted, rows = w.clone(), w.clone(), torch.tensor([7, 0, 7], device=backend.device)
    update, pair = backend.pairs([5, 6], [0.21, -0.4]), backend.pairs([8], [0.1])
    backend.module.add_noise(wanted, wanted, *update, 99, direction)
    ours, theirs = (torch.full((3, 130), torch.nan, dtype=dtype, device=backend.device) for _ in range(2))
    backend.module.add_noise_rows(ours, w, rows, *pair, 99, direction, update)
    backend.module.add_noise_rows(theirs, wanted, rows, *pair, 99, direction)
    assert torch.equal(ours, theirs)
    assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", noise.DIRECTIONS)
def test_many_tensors_are_each_tensor_alone(backend, direction, dtype, monkeypatch):
    monkeypatch.setattr(noise, "backend_for", lambda device: backend.module)
    draw = torch.Generator().manual_seed(0)
    ws = [torch.randn(n, generator=draw).to(dtype).to(backend.device) for n in (5, 64, 3000)]
    outs = [torch.full((3, w.numel()), torch.nan, dtype=dtype, device=backend.device) for w in ws]
    factor = torch.full((3, 1000), torch.nan, dtype=dtype, device=backend.device)
    items = [noise.Item(out, w, 7 + i, i % 2) for i, (out, w) in enumerate(zip(outs, ws, strict=True))]
    seeds, coefs = [1, 2, 1 << 63], [[0.5, -0.5, 0.1], [0.25, -1.0, 0.0]]
    seeds_31 = backend.pairs(seeds, [])[0][:, None]
    coefs_231 = torch.tensor(coefs, device=backend.device)[:, :, None]
    noise.Many([*items, noise.Item(factor, None, 50, 1)], direction).draw(seeds_31, coefs_231)
    for p, seed in enumerate(seeds):
        for i, (out, w) in enumerate(zip(outs, ws, strict=True)):
            close(out[p], backend.add(w, [seed], [coefs[i % 2][p]], 7 + i, direction), backend)
        close(factor[p], backend.add(torch.zeros_like(factor[p]), [seed], [coefs[1][p]], 50, direction), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.75])
def test_a_compensated_sum_loses_nothing_and_reads_its_factor_from_memory_too(backend, dtype, factor, monkeypatch):
    monkeypatch.setattr(noise, "backend_for", lambda device: backend.module)
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(777, generator=draw).to(dtype).to(backend.device)
    lost = (torch.randn(777, generator=draw) * 1e-3).to(dtype).to(backend.device)
    wanted = backend.add((w.double() + lost.double()) * factor, [5, 6], [0.25, -0.5], 9, "gaussian")
    found = []
    for given in (factor, torch.tensor(factor, device=backend.device)):
        ours, rest = w.clone(), lost.clone()
        noise.add_noise_compensated(ours, rest, *backend.pairs([5, 6], [0.25, -0.5]), 9, "gaussian", given)
        found.append((ours, rest))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    eps = torch.finfo(dtype).eps
    error = (ours.double() + rest.double() - wanted).abs()
    assert (error <= 4 * (eps**2 + 2**-23) * wanted.abs() + 1e-6).all()
    assert bool(rest.any()) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_many_compensated_sums_are_those_of_each(backend, dtype, direction, monkeypatch):
    """To the bit; a group whose coefficients are 0 and factor 1 stays as it is."""
    monkeypatch.setattr(noise, "backend_for", lambda device: backend.module)
    draw = torch.Generator().manual_seed(0)
    ws, lost = (
        [(torch.randn(n, generator=draw) * size).to(dtype).to(backend.device) for n in (777, 5, 1300, 64)]
        for size in (1.0, 1e-3)
    )
    coefs, factors = [[0.25, -0.5, 0.125], [0.0, 0.0, 0.0]], [0.75, 1.0]
    each = [(w.clone(), r.clone()) for w, r in zip(ws, lost, strict=True)]
    together = [(w.clone(), r.clone()) for w, r in zip(ws, lost, strict=True)]
    for i, (w, r) in enumerate(each):
        noise.add_noise_compensated(w, r, *backend.pairs([5, 6, 7], coefs[i % 2]), 7 + i, direction, factors[i % 2])
    some = noise.ManyCompensated([noise.Item(w, r, 7 + i, i % 2) for i, (w, r) in enumerate(together)], direction)
    seeds, _ = backend.pairs([5, 6, 7], coefs[0])
    some.add(seeds, torch.tensor(coefs, device=backend.device), torch.tensor(factors, device=backend.device))
    for i, (a, b) in enumerate(zip(each, together, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(b[0], ws[i]) == (i % 2 == 1)
