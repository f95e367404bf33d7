"""A rate that the run finds: its arithmetic in float64, its laws, and that nothing of it is lost or made up."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn

from zotune import ZeroOrderOptimizer
from zotune.errors import OptionError
from zotune.step.rates import OUTLIER, RHO, RHO_OWN, AutoRate

D = 24


def quadratic(
    lr="auto",
    steps=60,
    queries=8,
    method="leave-one-out",
    weights=1.0,
    loss=1.0,
    eps=1e-4,
    curvature=0.5,
    seed=0,
    **options,
):
    """The optimizer after a run on loss·curvature·‖θ/weights‖², θ of that scale, and what it moved θ by."""
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(D, dtype=torch.float64) * weights)
    start = theta.detach().clone()
    given = {"total_steps": steps} if lr == "auto" else {}
    optimizer = ZeroOrderOptimizer(
        [("w", theta)], method, lr=lr, eps=eps * weights, queries=queries, seed=seed, **given, **options
    )
    rates = []
    optimizer.watch = lambda record: rates.append(record.lr_G[0])
    for _ in range(steps):
        optimizer.step(lambda: loss * curvature * (theta.detach() / weights).square().sum())
    return optimizer, theta.detach() - start, rates


def test_each_rate_is_the_formula_of_what_was_found_two_steps_before():
    """Written out anew in float64, of what a record holds."""
    steps, queries = 12, 16
    seen = []
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(D, dtype=torch.float64))
    scale = float(f"{theta.detach().square().mean().sqrt():.4g}")
    optimizer = ZeroOrderOptimizer([("w", theta)], lr="auto", eps=1e-4, queries=queries, seed=3, total_steps=steps)
    optimizer.watch = seen.append
    for _ in range(steps):
        optimizer.step(lambda: theta.detach().square().sum() / 2)
    w = [sum(g * g for g in record.g_GQ[0]) / queries**2 for record in seen]  # v/n
    total = sum((1 - k / steps) ** 2 for k in range(steps))
    for k, record in enumerate(seen):
        known = w[: max(1, k - 1)]
        if len(known) * queries > 64:
            known = known[:]  # under an outlier's bound, which none of these steps is beyond
        mean, told = statistics.fmean(known), queries * len(known)
        a = 2 / (9 * told)
        sure = (1 - a - 1.2816 * math.sqrt(a)) ** -3
        expected = RHO * scale * (1 - k / steps) / math.sqrt(total * mean * sure)
        assert record.lr_G[0] == pytest.approx(expected, rel=2e-4), (
            k
        )  # g and lr are rounded to float32; s to four digits


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e4])
def test_a_loss_times_a_number_moves_the_weights_as_far(c):
    _, moved, _ = quadratic()
    _, again, _ = quadratic(loss=c)
    torch.testing.assert_close(again, moved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("c", [1e-2, 30.0])
def test_weights_times_a_number_move_as_far_by_their_measure(c):
    """θ, eps and the loss's argument in other units: lr is in their square over the loss's."""
    first, moved, _ = quadratic()
    second, again, _ = quadratic(weights=c)
    torch.testing.assert_close(again / c, moved, rtol=1e-3, atol=1e-5)
    assert second.rate.so_far == pytest.approx(first.rate.so_far * c**2, rel=1e-3)


def test_the_walk_is_rho_times_the_weights_whatever_the_directions_and_the_length():
    """On a linear loss g² is the same all along, so that the noise of the run is √(Σ lr²·v/n) = ρ·s, but for how sure v is."""
    slope = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for queries, steps in ((4, 400), (32, 100), (256, 30)):
        torch.manual_seed(0)
        theta = nn.Parameter(torch.randn(D, dtype=torch.float64))
        scale = theta.detach().square().mean().sqrt()
        optimizer = ZeroOrderOptimizer([("w", theta)], lr="auto", queries=queries, eps=1e-3, total_steps=steps)
        walk = []
        optimizer.watch = lambda r, walk=walk, n=queries: walk.append(
            r.lr_G[0] ** 2 * sum(g * g for g in r.g_GQ[0]) / n**2
        )
        for _ in range(steps):
            optimizer.step(lambda theta=theta: theta.detach() @ slope)
        assert 0.85 * RHO < math.sqrt(sum(walk)) / scale < 1.1 * RHO, queries


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 10_000])
def test_runs_of_any_length_have_rates_that_fall_to_nothing(steps):
    rate = AutoRate(steps, 0.2)
    found = []
    for k in range(steps):
        lr = rate.of_itself(k, 1.0, 16) if rate.unseen else rate.at(k)
        found.append(lr)
        rate.see(k, 1.0, 16, lr)
    assert all(lr > 0 for lr in found)
    assert math.sqrt(sum(lr * lr for lr in found)) <= RHO * 0.2
    assert math.sqrt(sum(lr * lr for lr in found)) > RHO * 0.2 * (
        0.7 if steps <= 10 else 0.9
    )  # early on v is taken for more
    assert steps < 10 or found[-1] <= max(found) / steps * 1.5


def test_a_constant_schedule_carries_the_weights_as_far():
    rate = AutoRate(200, 0.2)
    rate.plan(200, lambda step: 1.0)
    rates = []
    for k in range(200):
        rates.append(rate.of_itself(k, 1.0, 64) if rate.unseen else rate.at(k))
        rate.see(k, 1.0, 64, rates[-1])
    assert math.sqrt(sum(lr * lr for lr in rates)) == pytest.approx(RHO * 0.2, rel=0.03)
    assert rate.so_far == pytest.approx(rates[-1], rel=0.03)


def test_steps_that_land_while_the_next_is_under_way_give_the_same_rates():
    """As captured ones do: step k − 1 is not known when the rate of step k is sent."""
    w = [1.0 + (k * 7919 % 13) / 13 for k in range(80)]
    at_once, late = AutoRate(80, 0.2), AutoRate(80, 0.2)
    for rate in (at_once, late):
        rate.see(0, w[0], 16, rate.of_itself(0, w[0], 16))
    for k in range(1, 80):
        if k > 1:
            at_once.see(k - 1, w[k - 1], 16, at_once.at(k - 1))
            if k > 2:
                late.see(k - 2, w[k - 2], 16, 0.0)
        assert at_once.at(k) == late.at(k)


def test_one_outlier_is_shrugged_off():
    def last(outlier):
        rate = AutoRate(1000, 0.2)
        for k in range(60):
            rate.see(k, outlier if k == 40 else 1.0, 16, 1e-3)
            lr = rate.at(k + 1)
        return lr, rate

    (plain, _), (after, rate) = last(1.0), last(1e6)
    assert after > 0.9 * plain
    assert rate.mean < 1 + OUTLIER / 50
    assert not rate.halved


def test_a_g_that_rises_halves_the_rate_and_says_so():
    rate, said = AutoRate(500, 0.2), []
    rate.say = said.append
    for k in range(60):
        rate.see(k, 1.0, 64, 1e-3)
    before = rate.at(61)
    for k in range(60, 120):
        rate.see(k, 2.0, 64, 1e-3)
    assert rate.at(121) < 0.55 * before / math.sqrt(2) * (1 - 121 / 500) / (1 - 61 / 500) * 1.1
    assert rate.halved == 1
    assert len(said) == 2
    assert "halved" in said[1]
    steady = AutoRate(500, 0.2)
    for k in range(499):
        steady.see(k, 1.0 + 0.3 * math.sin(k), 64, 1e-3)
        steady.at(k + 1)
    assert not steady.halved


def test_steps_that_tell_nothing_have_no_rate_and_count_for_nothing():
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(D))
    start = theta.detach().clone()
    optimizer = ZeroOrderOptimizer([("w", theta)], "leave-one-out", lr="auto", queries=4, total_steps=20)
    for _ in range(10):
        optimizer.step(lambda: 1.0)
    assert torch.equal(theta.detach(), start)
    assert optimizer.rate.so_far == 0.0
    assert optimizer.rate.unseen
    optimizer.step(lambda: theta.detach().square().sum())
    assert optimizer.last.lr_G[0] > 0
    assert not torch.equal(theta.detach(), start)


def test_a_skipped_step_changes_nothing_of_the_rate():
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(D))
    optimizer = ZeroOrderOptimizer([("w", theta)], lr="auto", queries=4, total_steps=20)
    for _ in range(3):
        optimizer.step(lambda: theta.detach().square().sum())
    kept = (optimizer.rate.seen, optimizer.rate.mean, list(optimizer.rate.waiting))
    optimizer.step(lambda: math.nan)
    assert optimizer.last.skipped
    optimizer.rate.at(optimizer.steps)  # the steps before it land
    assert optimizer.rate.seen + len(optimizer.rate.waiting) == kept[0] + len(kept[2])


@pytest.mark.parametrize(
    "options",
    [
        {"method": "zo-sgd"},
        {"method": "zo-sgd", "estimator": "one-sided"},
        {"method": "zo-sgd-cons"},
        {"method": "zo-sgd-sign", "sign_mode": "scalar"},
        {"method": "fzoo"},
        {"method": "forward-grad"},
        {"method": "zo-sgd", "sparsity": 0.5, "mask_refresh": 20},
        {"method": "zo-sgd", "rounding": "compensated"},
        {"method": "zo-sgd", "fold_every": 4},
    ],
    ids=str,
)
def test_what_is_a_list_of_coefficients_descends_by_it(options):
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(8, dtype=torch.float64))
    first = float(theta.detach().square().sum())
    optimizer = ZeroOrderOptimizer([("w", theta)], lr="auto", eps=1e-4, queries=16, total_steps=120, **options)
    for _ in range(120):
        optimizer.step(lambda: theta.square().sum() / 2)
    assert float(theta.detach().square().sum()) < 0.05 * first


@pytest.mark.parametrize(
    ("method", "options"), [("zo-adam", {}), ("zo-sgd-mmt", {}), ("zo-sgd-sign", {}), ("fo-sgd", {}), ("fo-adam", {})]
)
def test_updates_that_are_no_list_of_coefficients_are_refused(method, options):
    with pytest.raises(OptionError, match=r"lr=.auto.: .*give a number"):
        ZeroOrderOptimizer(nn.Linear(2, 2), method, lr="auto", total_steps=5, **options)


def test_what_it_needs_is_said():
    with pytest.raises(OptionError, match="total_steps=None: lr='auto' needs the number of steps"):
        ZeroOrderOptimizer(nn.Linear(2, 2), lr="auto")
    with pytest.raises(OptionError, match="a number or 'auto'"):
        ZeroOrderOptimizer(nn.Linear(2, 2), lr="fast", total_steps=5)
    with pytest.raises(OptionError, match="all weights that train are 0"):
        ZeroOrderOptimizer([("w", nn.Parameter(torch.zeros(3)))], lr="auto", total_steps=5)
    optimizer = ZeroOrderOptimizer(nn.Linear(2, 2), lr="auto", total_steps=5)
    torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 5)
    with pytest.raises(OptionError, match="leave the scheduler out"):
        optimizer.step(lambda: 1.0)


def test_own_inputs_have_a_rate_of_their_own_measure():
    def rho(method):
        return ZeroOrderOptimizer(nn.Linear(2, 2), method, lr="auto", total_steps=5).rate.rho

    assert (rho("own-inputs"), rho("leave-one-out")) == (RHO_OWN, RHO)


def test_zeros_tell_no_scale():
    a, b = nn.Parameter(torch.full((4,), 0.5)), nn.Parameter(torch.zeros(100))
    optimizer = ZeroOrderOptimizer([("a", a), ("b", b)], lr="auto", total_steps=5)
    assert optimizer.rate.scale == 0.5


def test_the_scale_of_an_adapter_that_begins_at_zero_is_that_of_the_weights_it_is_added_to():
    model = nn.ModuleDict(
        {"base": nn.Linear(8, 8, bias=False), "a": nn.Linear(8, 2, bias=False), "b": nn.Linear(2, 8, bias=False)}
    )
    for name, value in (("base", 0.25), ("a", 0.01), ("b", 0.0)):
        nn.init.constant_(model[name].weight, value)
    model["base"].requires_grad_(False)
    rate = ZeroOrderOptimizer(model, lr="auto", total_steps=5).rate
    assert rate.scale == pytest.approx(math.sqrt((64 * 0.25**2 + 16 * 0.01**2) / 80), rel=1e-3)
    model["b"].weight.data.fill_(0.02)  # one that was trained before has a scale of its own
    assert ZeroOrderOptimizer(model, lr="auto", total_steps=5).rate.scale < 0.02


def test_a_group_with_a_number_keeps_it():
    first, second = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    groups = [{"params": [("a", first)]}, {"params": [("b", second)], "lr": 1e-3}]
    optimizer = ZeroOrderOptimizer(groups, lr="auto", total_steps=5)
    optimizer.step(lambda: (first.detach() + second.detach()).square().sum())
    assert optimizer.last.lr_G[1] == 1e-3
    assert optimizer.last.lr_G[0] not in (0, 1, 1e-3)


def test_a_block_tells_by_its_share_of_the_weights():
    """A step at rate lr moves the weights of all blocks by lr²·w in the mean square, whatever their sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = ZeroOrderOptimizer(model, lr="auto", blocks="linear", queries=4, total_steps=200)
    squares, moved = [], []
    for _ in range(200):
        optimizer.step(lambda: model(x).square().mean())
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        moved.append(float((after - before).square().mean()))
        waiting = optimizer.rate.waiting[-1][1]
        squares.append(waiting * optimizer.last.lr_G[0] ** 2)
        before = after
    assert statistics.fmean(moved) == pytest.approx(statistics.fmean(squares), rel=0.15)


def test_a_saved_state_goes_on_to_the_same_bits():
    def made(theta):
        return ZeroOrderOptimizer([("w", theta)], "leave-one-out", lr="auto", queries=4, total_steps=30)

    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(D))
    optimizer = made(whole)
    for step in range(30):
        if step == 11:
            cut, state = nn.Parameter(whole.detach().clone()), optimizer.state_dict()
        optimizer.step(lambda: whole.detach().square().sum())
    again = made(cut)
    again.load_state_dict(state)
    for _ in range(11, 30):
        again.step(lambda: cut.detach().square().sum())
    assert torch.equal(whole, cut)
    assert again.rate.state_dict() == optimizer.rate.state_dict()


@pytest.mark.slow
def test_a_quadratic_is_descended_as_by_the_best_of_five_rates():
    """With directions enough that noise is what limits it."""

    def left(lr):
        torch.manual_seed(0)
        theta = nn.Parameter(torch.randn(16, dtype=torch.float64))
        given = {"total_steps": 300} if lr == "auto" else {}
        optimizer = ZeroOrderOptimizer([("w", theta)], "leave-one-out", lr=lr, eps=1e-5, queries=32, **given)
        schedule = None if lr == "auto" else torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
        first = float(theta.detach().square().sum())
        for _ in range(300):
            optimizer.step(lambda: theta.detach().square().sum() / 2)
            if schedule is not None:
                schedule.step()
        return float(theta.detach().square().sum()) / first

    grid = {lr: left(lr) for lr in (3e-3, 1e-2, 3e-2, 0.1, 0.3)}
    assert left("auto") < 1e-3
    assert left("auto") < statistics.median(grid.values())
