"""Updates that wait for each other, and what rounding does to updates of 16-bit weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.record.trajectory import Record


def small(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def rows_of(model):
    return lambda batch: model(batch["x"]).square().sum(1)


def data(dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {"x": torch.linspace(-1, 1, 24, dtype=dtype).view(4, 6)}


def dense(engine, param, seed: int) -> torch.Tensor:
    """z of a direction, materialised."""
    slot = engine.directions.slots[id(param)]

    def drawn(pid, n):
        z = torch.empty(n)
        noise.fill(z, seed, pid, engine.directions.distribution)
        return z.to(param.dtype)

    if param in set(engine.factored.params if hasattr(engine, "factored") else ()):
        u, v = (drawn(pid, side) for pid, side in zip(engine.factored.ids_of(param), param.shape, strict=True))
        return torch.outer(u, v)
    return drawn(slot.id, param.numel()).view(param.shape)


@pytest.mark.parametrize("options", [{}, {"queries": 2}, {"engine": "dual"}, {"groups": 2}, {"groups": "batch"}])
def test_the_updates_of_k_steps_are_estimated_at_the_same_weights_and_applied_together(options):
    model = small()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = ZeroOrderOptimizer(model, lr=1e-2, seed=3, fold_every=3, **options)
    expected = [p.clone() for p in start]
    for step in range(3):
        optimizer.step(rows_of(model), batch=data())
        seeds, (g,) = optimizer.seeds(step, 0), optimizer.last.g_GQ
        assert len(seeds) == len(g)
        for i, param in enumerate(model.parameters()):
            for seed, scalar in zip(seeds, g, strict=True):
                expected[i] -= 1e-2 * scalar / len(g) * dense(optimizer.engine, param, seed)
            if step < 2:
                assert torch.equal(param, start[i])
    for param, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), wanted, rtol=1e-6, atol=1e-8)


def test_flush_applies_what_waits_and_nothing_twice():
    model = small()
    optimizer = ZeroOrderOptimizer(model, lr=1e-2, fold_every=4)
    before = copy.deepcopy(model.state_dict())
    optimizer.step(rows_of(model), batch=data())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    optimizer.flush()
    once = copy.deepcopy(model.state_dict())
    assert not torch.equal(once["0.weight"], before["0.weight"])
    optimizer.flush()
    assert torch.equal(model.state_dict()["0.weight"], once["0.weight"])


@given(at=st.integers(1, 7), every=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_state_saved_between_folds_goes_on_as_if_never_saved(at, every):
    straight, broken = small(), small()
    first = ZeroOrderOptimizer(straight, lr=1e-2, fold_every=every, groups="batch")
    second = ZeroOrderOptimizer(broken, lr=1e-2, fold_every=every, groups="batch")
    for step in range(8):
        if step == at:
            file = io.BytesIO()
            torch.save(second.state_dict(), file)
            file.seek(0)
            second = ZeroOrderOptimizer(broken, lr=1e-2, fold_every=every, groups="batch")
            second.load_state_dict(torch.load(file, weights_only=True))
        first.step(rows_of(straight), batch=data())
        second.step(rows_of(broken), batch=data())
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), broken.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"fold_every": 3},
        {"fold_every": 2, "groups": "batch"},
        {"rounding": "compensated"},
        {"rounding": "compensated", "fold_every": 2},
        {"rounding": "compensated", "method": "zo-adam"},
        {"rounding": "compensated", "method": "zo-sgd-cons"},
        {"rounding": "compensated", "weight_decay": 0.1},
        {"rounding": "compensated", "groups": "batch"},
        {"rounding": "compensated", "engine": "lowrank", "fold_every": 2},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_give_the_weights_again_bit_for_bit(options, dtype):
    options = {"method": "zo-sgd"} | options
    trained, rebuilt = small(dtype), small(dtype)
    optimizer = ZeroOrderOptimizer(trained, lr=1e-2, eps=1e-2, **options)
    again = ZeroOrderOptimizer(rebuilt, lr=0.0, eps=1e-2, **options)
    for _ in range(6):
        optimizer.step(rows_of(trained), batch=data(dtype))
        last = optimizer.last
        again.apply_record(
            Record(last.step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped, choice=last.choice)
        )
    assert not torch.equal(rebuilt[0].weight, small(dtype)[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), rebuilt.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_compensated_updates_add_up_where_rounded_ones_are_lost(backend, direction, monkeypatch):
    monkeypatch.setenv("ZOTUNE_NOISE_BACKEND", backend)
    w = torch.linspace(0.5, 1.0, 1000).bfloat16()
    wanted, rounded, kept, lost = w.double(), w.clone(), w.clone(), torch.zeros_like(w)
    for step in range(50):
        seeds, coefs = torch.tensor([step]), torch.tensor([1e-4])
        noise.add_noise(wanted, wanted, seeds, coefs.double(), 7, direction)
        noise.add_noise(rounded, rounded, seeds, coefs, 7, direction)
        noise.add_noise_compensated(kept, lost, seeds, coefs, 7, direction)
    assert torch.equal(kept, (kept.float() + lost.float()).bfloat16())
    error = (kept.double() + lost.double() - wanted).abs().max()
    assert error < 50 * 2.0**-17  # half a unit of the residual's last place, each step
    assert (rounded.double() - wanted).abs().max() > 10 * error


def test_nothing_changes_under_a_coefficient_of_zero():
    w, lost = torch.full((8,), 0.7).bfloat16(), torch.full((8,), 1e-3).bfloat16()
    noise.add_noise_compensated(w, lost, torch.tensor([1]), torch.zeros(1), 1, "gaussian")
    assert torch.equal(w, torch.full((8,), 0.7).bfloat16())
    assert torch.equal(lost, torch.full((8,), 1e-3).bfloat16())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"fold_every": 2, "method": "zo-adam"}, "fold_every=2"),
        ({"fold_every": 2, "method": "zo-sgd-cons"}, "fold_every=2"),
        ({"fold_every": 2, "weight_decay": 0.1}, "fold_every=2"),
        ({"fold_every": 0}, "fold_every=0"),
        ({"rounding": "compensated", "groups": "batch", "weight_decay": 0.1}, "rounding"),
        ({"rounding": "up"}, "unknown rounding"),
    ],
)
def test_what_does_not_go_together_is_refused(options, line):
    with pytest.raises(ValueError, match=line):
        ZeroOrderOptimizer(small(), **options)


def test_a_low_rank_update_of_many_directions_is_the_sum_of_its_parts():
    """Past what is folded in one pass, and with factors drawn a parameter at a time."""
    at_once, apart = small(), small()
    x = {"x": torch.randn(24, 6, dtype=torch.float64)}
    first = ZeroOrderOptimizer(at_once, lr=1e-3, groups="batch", fold_every=4)
    second = ZeroOrderOptimizer(apart, lr=1e-3, groups="batch", fold_every=4)
    second.flush = lambda: None
    for _ in range(4):
        first.step(rows_of(at_once), batch=x)
        second.step(rows_of(apart), batch=x)
    for moved in second.pending:
        second.engine.writer.apply(moved, 1)
    for a, b in zip(at_once.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_group_that_is_added_begins_with_no_update_of_the_others_waiting():
    model, more = small(), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = ZeroOrderOptimizer(model, lr=1e-2, fold_every=3)
    before = copy.deepcopy(model)
    optimizer.step(rows_of(model), batch=data())
    optimizer.add_param_group({"params": [("more", more)]})
    assert not torch.equal(model[0].weight, before[0].weight)
    for _ in range(3):
        optimizer.step(lambda batch: rows_of(model)(batch) + more.sum(), batch=data())
    assert bool(more.any())


def test_a_stranger_s_record_that_is_no_number_moves_nothing_in_a_replay_either():
    from zotune.record import replay

    model = small(torch.float32)
    before = copy.deepcopy(model)
    optimizer = ZeroOrderOptimizer(model, lr=0.0)
    replay.apply(optimizer, [Record(0, 1.0, 1.0, (float("nan"),), (1e-2,), (0.0,))])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert optimizer.steps == 1
