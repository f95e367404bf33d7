"""Every rule against its formula in float64, on materialised directions; state, resumption and replay to the bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.noise import reference
from zotune.record.trajectory import Record
from zotune.step.arithmetic import clipped
from zotune.updates import Adam, Conservative, Rule, Sgd

LR, EPS = 3e-3, 1e-3
ZO = ("zo-sgd", "zo-sgd-mmt", "zo-sgd-sign", "zo-sgd-cons", "zo-adam")


class Toy(nn.Module):
    """Two tensors of unlike shapes, one of them stored transposed, and a loss with curvature."""

    def __init__(self, dtype=torch.float64, device="cpu") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(5, 7, generator=draw, dtype=torch.float64).to(dtype))
        self.b = nn.Parameter(torch.randn(7, 4, generator=draw, dtype=torch.float64).to(dtype).t())
        self.calls = 0

    def loss(self):
        self.calls += 1
        x = torch.linspace(-1, 1, 15, dtype=self.a.dtype).view(3, 5)
        return torch.tanh(x @ self.a @ self.b.t()).double().square().sum() + self.b.double().sin().sum()


def z_of(model: nn.Module, seed: int, direction: str = "gaussian") -> dict[str, torch.Tensor]:
    draw = reference.DRAW[direction]
    return {
        name: draw(torch.arange(p.numel()), seed, noise.parameter_id(name)).double().view(p.shape)
        for name, p in model.named_parameters()
    }


def loss_at(model: nn.Module, z: dict[str, torch.Tensor], scale: float) -> float:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += scale * z[name]
    return other.loss().item()


def estimate(model: nn.Module, step: int, queries: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """ĝ, with z materialised and g in float64."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for q in range(queries):
        z = z_of(model, noise.step_seed(seed, step, q))
        g = (loss_at(model, z, EPS) - loss_at(model, z, -EPS)) / (2 * EPS)
        for name in total:
            total[name] += g * z[name] / queries
    return total


def by_hand(method: str, model: nn.Module, steps: int, queries: int, decay: float) -> None:
    """The textbook rule on whole tensors."""
    m = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for step in range(steps):
        g = estimate(model, step, queries)
        best = 0.0
        if method == "zo-sgd-cons":
            found = {s: loss_at(model, g, s * LR) for s in (0.0, -1.0, 1.0)}
            best = min(found, key=found.get)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p *= 1 - LR * decay
                if method == "zo-sgd":
                    p -= LR * g[n]
                elif method == "zo-sgd-sign":
                    p -= LR * g[n].sign()
                elif method == "zo-sgd-mmt":
                    m[n] = 0.9 * m[n] + g[n]
                    p -= LR * m[n]
                elif method == "zo-adam":
                    m[n] = 0.9 * m[n] + 0.1 * g[n]
                    v[n] = 0.999 * v[n] + 0.001 * g[n] ** 2
                    m_hat, v_hat = m[n] / (1 - 0.9 ** (step + 1)), v[n] / (1 - 0.999 ** (step + 1))
                    p -= LR * m_hat / (v_hat.sqrt() + 1e-8)
                else:
                    p += best * LR * g[n]


@pytest.mark.parametrize("method", ZO)
@pytest.mark.parametrize(("queries", "decay"), [(1, 0.0), (3, 0.5)])
def test_a_method_is_its_formula(method, queries, decay):
    decay = 0.0 if method == "zo-sgd-cons" else decay
    model, hand = Toy(), Toy()
    optimizer = ZeroOrderOptimizer(model, method, lr=LR, eps=EPS, queries=queries, weight_decay=decay)
    for _ in range(4):
        optimizer.step(model.loss)
    by_hand(method, hand, 4, queries, decay)
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3e-7)  # g, lr and z are float32
    assert (model.a - Toy().a).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"beta1": 0.5}, {"beta2": 0.7}, {"adam_eps": 2.0}])
def test_adams_options_are_those_of_torch(options):
    """Adam on the same gradients: torch's, given the estimate of each step."""
    names = {"beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8} | options
    model, hand, plain = Toy(), Toy(), Toy()
    optimizer = ZeroOrderOptimizer(model, "zo-adam", lr=LR, eps=EPS, **options)
    default = ZeroOrderOptimizer(plain, "zo-adam", lr=LR, eps=EPS)
    adam = torch.optim.Adam(hand.parameters(), lr=LR, betas=(names["beta1"], names["beta2"]), eps=names["adam_eps"])
    for step in range(4):
        optimizer.step(model.loss)
        default.step(plain.loss)
        found = estimate(hand, step)
        for name, p in hand.named_parameters():
            p.grad = found[name]
        adam.step()
    for p, q, r in zip(model.parameters(), hand.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3e-7)
        assert (p - r).abs().max() > 1e-4


def test_momentum_is_its_option():
    model, hand = Toy(), Toy()
    optimizer = ZeroOrderOptimizer(model, "zo-sgd-mmt", lr=LR, eps=EPS, momentum=0.3)
    sgd = torch.optim.SGD(hand.parameters(), lr=LR, momentum=0.3)
    for step in range(4):
        optimizer.step(model.loss)
        found = estimate(hand, step)
        for name, p in hand.named_parameters():
            p.grad = found[name]
        sgd.step()
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize(
    ("method", "copies"),
    [("zo-sgd", 0), ("zo-sgd-sign", 0), ("zo-sgd-cons", 0), ("zo-sgd-mmt", 1), ("zo-adam", 2), ("forward-grad", 0)],
)
def test_the_state_that_is_reported_is_what_the_method_keeps(method, copies, rounding, dtype):
    """A copy in the state's dtype for each moment, and one in the weights' own for what rounding takes."""
    wide = 8 if dtype == torch.float64 else 4
    for state_dtype, size in (("float32", wide), ("bfloat16", 2), ("parameter", dtype.itemsize)):
        model = Toy(dtype)
        options = {"state_dtype": state_dtype} if copies else {}
        optimizer = ZeroOrderOptimizer(model, method, lr=LR, eps=1e-2, rounding=rounding, **options)
        for _ in range(2 if method != "zo-sgd-cons" else 12):  # a conservative one moves, sooner or later
            optimizer.step(model.loss)
        trained = sum(p.numel() for p in model.parameters())
        assert optimizer.state_bytes == trained * (copies * size + (rounding == "compensated") * dtype.itemsize)
    masked = Toy(dtype)
    optimizer = ZeroOrderOptimizer(masked, lr=LR, sparsity=0.5, mask="magnitude")
    optimizer.step(masked.loss)
    assert optimizer.state_bytes == sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("tile", [1, 8, 1000])
@pytest.mark.parametrize("method", ["zo-sgd-mmt", "zo-adam", "zo-sgd-sign"])
def test_tiles_change_no_bit(method, tile, monkeypatch):
    whole, tiled = Toy(torch.float32), Toy(torch.float32)
    for model in (whole, tiled):
        optimizer = ZeroOrderOptimizer(model, method, lr=LR, queries=2)
        for _ in range(3):
            optimizer.step(model.loss)
        monkeypatch.setattr("zotune.updates.rule.TILE", tile)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), tiled.parameters(), strict=True))


def test_sign_of_the_scalar_moves_along_z():
    model, hand = Toy(), Toy()
    ZeroOrderOptimizer(model, "zo-sgd-sign", lr=LR, eps=EPS, sign_mode="scalar").step(model.loss)
    z = z_of(hand, noise.step_seed(0, 0))
    sign = math.copysign(1, loss_at(hand, z, EPS) - loss_at(hand, z, -EPS))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.data, hand.get_parameter(name) - LR * sign * z[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@settings(max_examples=25)
@given(lr=st.floats(1e-6, 3.0), seed=st.integers(0, 1 << 40))
def test_a_conservative_step_is_never_worse_on_its_batch(estimator, lr, seed):
    model = Toy()
    before, start = model.loss().item(), [p.detach().clone() for p in model.parameters()]
    optimizer = ZeroOrderOptimizer(model, "zo-sgd-cons", lr=lr, eps=EPS, seed=seed, estimator=estimator)
    optimizer.step(model.loss)
    assert model.loss().item() <= before
    stayed = all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert stayed == (optimizer.last.choice == 0)


def test_a_conservative_step_makes_each_of_its_choices_and_stays_on_a_tie():
    def choice(losses):
        given = iter(losses)
        model = Toy()
        optimizer = ZeroOrderOptimizer(model, "zo-sgd-cons", lr=LR)
        optimizer.step(lambda: (model.loss(), next(given))[1])
        return optimizer.last.choice

    assert choice([2.0, 1.0, 3.0, 2.0, 4.0]) == 1
    assert choice([2.0, 1.0, 3.0, 3.0, 2.0]) == 2
    assert choice([2.0, 1.0, 3.0, 3.0, 3.0]) == 0
    assert choice([2.0, 1.0, 3.0, math.nan, 4.0]) == 0
    assert Conservative().choose(torch.tensor([1.0, math.nan, 0.5])) == 2


@pytest.mark.parametrize("method", ["zo-sgd-mmt", "zo-adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "parameter"])
def test_state_has_its_dtype_and_comes_back_with_its_bits(method, dtype, state_dtype):
    def made(model):
        return ZeroOrderOptimizer(model, method, lr=LR, eps=1e-2, seed=2, state_dtype=state_dtype)

    whole, half = Toy(dtype), Toy(dtype)
    first = made(whole)
    for _ in range(6):
        first.step(whole.loss)
    earlier = made(half)
    for _ in range(3):
        earlier.step(half.loss)
    saved = copy.deepcopy(earlier.state_dict())
    later = made(half)
    later.load_state_dict(saved)
    for p in half.parameters():
        for name in later.method.rule.buffers:
            assert later.state[p][name].dtype == {"parameter": dtype}.get(
                state_dtype, getattr(torch, state_dtype, None)
            )
            assert torch.equal(later.state[p][name], earlier.state[p][name])
    for _ in range(3):
        later.step(half.loss)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters(), strict=True))


def record_of(optimizer: ZeroOrderOptimizer) -> Record:
    last = optimizer.last
    return Record(last.step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped, choice=last.choice)


@pytest.mark.parametrize("method", ZO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_scalars_replay_to_the_bits_of_the_run(method, dtype):
    options = {"lr": 1e-2, "eps": 1e-2, "queries": 2, "seed": 5}
    model, again = Toy(dtype), Toy(dtype)
    optimizer, replayed = (ZeroOrderOptimizer(m, method, **options) for m in (model, again))
    for step in range(6):
        optimizer.step(model.loss if step != 3 else lambda: math.nan)
        replayed.apply_record(record_of(optimizer))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert again.calls == 0
    with pytest.raises(ValueError, match="step 6 comes next"):
        replayed.apply_record(record_of(optimizer))


def test_g_is_clipped_before_it_is_used_and_recorded():
    model, free = Toy(), Toy()
    ZeroOrderOptimizer(free, lr=LR, eps=EPS).step(free.loss)
    optimizer = ZeroOrderOptimizer(model, lr=LR, eps=EPS, g_clip=1e-2)
    optimizer.step(model.loss)
    assert abs(optimizer.last.g_GQ[0][0]) == 1e-2
    moved = (model.a - Toy().a) / (free.a - Toy().a)
    torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=1e-5, atol=0)
    assert math.isnan(clipped(torch.tensor([math.nan, 3.0, -3.0]), 1.0)[0])
    assert clipped(torch.tensor([3.0, -3.0, 0.5]), 1.0).tolist() == [1.0, -1.0, 0.5]


@pytest.mark.parametrize("method", ["zo-sgd", "zo-sgd-sign", "zo-sgd-cons"])
def test_without_slope_a_rule_without_state_leaves_every_bit(method):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, before = Toy(dtype), Toy(dtype)
        ZeroOrderOptimizer(model, method, lr=1.0).step(lambda: 3.0)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("zo-sgd", {"momentum": 0.9}, "no option 'momentum'"),
        ("zo-sgd-mmt", {"momentum": 1.0}, "under 1"),
        ("zo-adam", {"state_dtype": "float8"}, "state_dtype"),
        ("zo-sgd-sign", {"sign_mode": "elementwise"}, "element"),
        ("zo-sgd-cons", {"weight_decay": 0.1}, "decay"),
        ("zo-adam", {"groups": 2}, "element by element"),
        ("zo-adam", {"engine": "lowrank"}, "element by element"),
        ("zo-sgd", {"g_clip": 0.0}, "g_clip"),
    ],
)
def test_what_does_not_go_together_is_refused(method, options, said):
    with pytest.raises(ValueError, match=said):
        ZeroOrderOptimizer(Toy(), method, **options)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [Sgd(), Adam(), Adam("bfloat16"), Adam("parameter")])
def test_an_update_from_a_gradient_is_the_rule_by_torchs_kernels_too(rule, dtype, decay, monkeypatch):
    monkeypatch.setattr("zotune.updates.rule.TILE", 16)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(5, 9, generator=draw, dtype=torch.float64).to(dtype)
    fast, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    states = ({fast: {}}, {plain: {}})
    taken, real = [], type(rule)._by_torch
    monkeypatch.setattr(type(rule), "_by_torch", lambda *given: taken.append(real(*given)) or taken[-1])
    for strided in (False, True, False):
        slope = torch.randn(5, 18, generator=draw, dtype=torch.float64).to(dtype)
        slope = slope.t()[:9].t() if strided else slope[:, ::2]
        rule.descend([fast], [slope], 0.01, decay, states[0])
        with monkeypatch.context() as without:
            without.setattr(type(rule), "_by_torch", Rule._by_torch)
            rule.descend([plain], [slope], 0.01, decay, states[1])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fast.data, plain.data, rtol=2 * eps, atol=eps / 8)
    assert states[0][fast]["steps"] == states[1][plain]["steps"] == 3
    wide = dtype in (torch.float32, torch.float64)
    other = rule.state_dtype == "bfloat16" and dtype != torch.bfloat16
    assert set(taken) == {(wide and not decay) if isinstance(rule, Sgd) else not other}
    for name in rule.buffers:
        ours, theirs = states[0][fast][name], states[1][plain][name]
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(ours.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [Sgd(), Adam(), Adam("parameter")])
def test_gradients_of_any_strides_and_any_default_dtype_give_the_same_update(rule, dtype, monkeypatch):
    slope = torch.randn(45, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    for gradient in (slope[:, 0], torch.ones((), dtype=dtype).expand(45)):
        moved = []
        for values, default in ((gradient.clone().contiguous(), torch.float32), (gradient, torch.float16)):
            param = nn.Parameter(torch.ones(45, dtype=dtype))
            state = {param: {"steps": 300}}
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                rule.descend([param], [values], 0.1, 0.0, state)
            finally:
                torch.set_default_dtype(before)
            moved.append(param.data)
        assert torch.equal(*moved)
        assert not torch.equal(moved[0], torch.ones(45, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [Sgd(), Adam(), Adam("parameter")])
def test_no_bit_moves_at_lr_0_and_a_small_one_is_not_lost(rule, dtype):
    start = torch.tensor([-0.0, 0.0, 1.0, -2.0], dtype=dtype)
    param = nn.Parameter(start.clone())
    rule.descend([param], [torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=dtype)], 0.0, 0.1, {param: {}})
    assert torch.equal(param.data.view(torch.uint8), start.view(torch.uint8))
    param = nn.Parameter(torch.zeros(4, dtype=dtype))
    rule.descend([param], [torch.full((4,), 1e4, dtype=dtype)], 1e-6 if rule.buffers else 1e-8, 0.0, {param: {}})
    expected = 1e-6 if rule.buffers else 1e-4
    torch.testing.assert_close(param.data.double(), torch.full((4,), -expected).double(), rtol=0.05, atol=0)
