"""The loss that an engine gives at θ + εz is that of a copy whose weights were really displaced; the weights stay as they were."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from families import CAUSAL, MASKED, H, V, snapshot, unchanged
from torch import nn

from zotune import NonFiniteLoss, ZeroOrderOptimizer, noise
from zotune.directions import Displacement
from zotune.engines import sequential
from zotune.methods import Method
from zotune.noise import reference


class CustomTie(nn.Module):
    """The head reads the embedding's weight itself; attention reads a projection that is never called; one weight is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.attention = nn.MultiheadAttention(H, 4, batch_first=True)
        self.lstm = nn.LSTM(H, H, batch_first=True)
        self.mix = nn.Parameter(torch.randn(H, H) / 8)
        self.unused = nn.Linear(3, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.lstm(x)[0]
        return F.linear(x @ self.mix.t() + x @ self.mix[:, : H // 2] @ self.mix[: H // 2], self.embed.weight)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CustomTie().eval() if name == "toy" else families.build(name)


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(3, 8) * 5 % (V - 4) + 2
    out = model(input_ids=ids)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float() if logits.dtype != torch.float64 else logits[:, :-1].flatten(0, 1),
        ids[:, 1:].flatten(),
    )


def displaced_copy(model: nn.Module, seed: int, coef: float, direction: str = "gaussian") -> nn.Module:
    """Every parameter displaced by the reference, in a copy."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in other.named_parameters():
            seeds, coefs = torch.tensor([seed]), torch.tensor([coef], dtype=torch.float32)
            reference.add_noise(param.data, param.data, seeds, coefs, noise.parameter_id(name), direction)
    return other


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, "toy"])
@pytest.mark.parametrize("direction", noise.DIRECTIONS)
def test_the_loss_at_displaced_weights_is_that_of_a_displaced_copy(name, direction):
    model = build(name).double()
    before = snapshot(model)
    engine = ZeroOrderOptimizer(model, direction=direction).engine
    with torch.no_grad():
        for coef in (1e-2, -1e-2):
            ours = engine.loss(lambda: loss_of(model), Displacement((77,), ((coef,),)))
            theirs = loss_of(displaced_copy(model, 77, coef, direction))
            torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)  # z is float32: backends agree to 1e-6 of it
            assert abs(ours - loss_of(model)) > 1e-4
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_signs_displace_16_bit_weights_to_the_same_bits(name, dtype):
    model = build(name).to(dtype)
    engine = ZeroOrderOptimizer(model, direction="rademacher").engine
    with torch.no_grad():
        ours = engine.loss(lambda: loss_of(model), Displacement((5,), ((1e-2,),)))
        torch.testing.assert_close(ours, loss_of(displaced_copy(model, 5, 1e-2, "rademacher")), rtol=1e-6, atol=0)


def test_a_head_in_tiles_gives_the_loss_of_a_whole_one(monkeypatch):
    model = build("llama").double()
    engine = ZeroOrderOptimizer(model).engine
    at = Displacement((9,), ((1e-2,),))
    whole = engine.loss(lambda: loss_of(model), at)
    monkeypatch.setattr(sequential, "TILE_BYTES", 1000)
    torch.testing.assert_close(engine.loss(lambda: loss_of(model), at), whole, rtol=1e-13, atol=0)


def test_scratch_holds_no_more_than_two_buffers_however_deep_the_model():
    config = copy.deepcopy(CAUSAL["llama"])
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 8, 128, 512
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    optimizer = ZeroOrderOptimizer(model)
    optimizer.step(lambda: loss_of(model))
    free = optimizer.engine.scratch._free
    assert len(free) <= 2
    assert sum(buffer.numel() for buffer in free) <= 2 * 4 * 512 * 128


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_step_with_lr_0_and_a_closure_that_raises_leave_every_bit(dtype):
    model = build("llama").to(dtype)
    with torch.no_grad():
        next(model.parameters()).view(-1)[:7] = -0.0
    before, optimizer = snapshot(model), ZeroOrderOptimizer(model, lr=0.0)
    for _ in range(20):
        optimizer.step(lambda: loss_of(model))
    assert unchanged(model, before)
    calls = []

    def raises():
        calls.append(loss_of(model))
        if len(calls) == 2:
            raise RuntimeError("half-way")
        return calls[-1]

    optimizer = ZeroOrderOptimizer(model, lr=1.0)
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step(raises)
    assert unchanged(model, before)
    assert optimizer.steps == 0


def test_a_closure_that_raises_inside_a_module_leaves_every_bit():
    model = build("toy")
    optimizer = ZeroOrderOptimizer(model, lr=1.0)
    optimizer.step(lambda: loss_of(model))
    before = snapshot(model)
    model.lstm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: loss_of(model))
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("estimator", "queries", "calls"),
    [("two-sided", 1, 2), ("two-sided", 3, 6), ("one-sided", 1, 2), ("one-sided", 3, 4)],
)
def test_a_step_is_its_formula(estimator, queries, calls):
    """θ ← θ − (lr/Q) Σ g_q·z_q in float64, z materialised by the reference."""
    model = build("gpt2").double()
    lr, eps = 1e-3, 1e-3
    seeds = [noise.step_seed(4, 0, q) for q in range(queries)]
    seeds = [s - (1 << 64) if s >> 63 else s for s in seeds]
    with torch.no_grad():
        plus = [loss_of(displaced_copy(model, s, eps)) for s in seeds]
        minus = [loss_of(displaced_copy(model, s, -eps)) if estimator == "two-sided" else loss_of(model) for s in seeds]
    width = 2 * eps if estimator == "two-sided" else eps
    expected = copy.deepcopy(model)
    for s, a, b in zip(seeds, plus, minus, strict=True):
        step = displaced_copy(model, s, -lr * float((a - b) / width) / queries)
        with torch.no_grad():
            for p, q, base in zip(expected.parameters(), step.parameters(), model.parameters(), strict=True):
                p += q - base
    counted = []
    model.register_forward_hook(lambda *_: counted.append(1))
    optimizer = ZeroOrderOptimizer(model, lr=lr, eps=eps, seed=4, estimator=estimator, queries=queries)
    optimizer.step(lambda: loss_of(model))
    assert len(counted) == optimizer.forward_passes == calls
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)  # g is rounded to float32 before it is used


def test_groups_have_their_own_lr_eps_and_decay():
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(5).double()), nn.Parameter(torch.randn(7).double())
    start = a.detach().clone(), b.detach().clone()
    groups = [
        {"params": [("a", a)], "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.5},
        {"params": [("b", b)], "lr": 2e-2, "eps": 4e-3},
    ]
    optimizer = ZeroOrderOptimizer(groups, seed=1)
    optimizer.step(lambda: (a**2).sum() + (b**3).sum())
    seed = noise.step_seed(1, 0)
    za, zb = (reference.normals(torch.arange(n), seed, noise.parameter_id(k)).double() for k, n in (("a", 5), ("b", 7)))
    f = lambda s: ((start[0] + s * 1e-3 * za) ** 2).sum() + ((start[1] + s * 4e-3 * zb) ** 3).sum()  # noqa: E731
    half = (f(1) - f(-1)) / 2
    torch.testing.assert_close(a.data, start[0] * (1 - 1e-2 * 0.5) - 1e-2 * half / 1e-3 * za, rtol=0, atol=1e-6)
    torch.testing.assert_close(b.data, start[1] - 2e-2 * half / 4e-3 * zb, rtol=0, atol=1e-6)


def test_the_mean_of_many_estimates_is_the_gradient_of_a_quadratic():
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean, n = torch.zeros(3, dtype=torch.float64), 4000
    start = w.detach().clone()
    for seed in range(n):
        with torch.no_grad():
            w.copy_(start)
        ZeroOrderOptimizer([("w", w)], lr=1.0, eps=1e-3, seed=seed).step(lambda: (scale * w**2).sum() / 2)
        mean += (start - w.detach()) / n
    gradient = scale * start
    spread = (gradient.norm() ** 2 + gradient**2).sqrt() / n**0.5  # of an estimate's element, over √n
    assert ((mean - gradient).abs() < 4 * spread).all()


def test_a_step_without_slope_changes_nothing_and_frozen_parameters_never_change():
    model = build("llama")
    model.get_input_embeddings().requires_grad_(False)
    before = snapshot(model)
    optimizer = ZeroOrderOptimizer(model, lr=1.0)
    optimizer.step(lambda: 3.0)
    assert unchanged(model, before)
    optimizer.step(lambda: loss_of(model))
    assert torch.equal(model.get_input_embeddings().weight, before[0][2])


def test_a_loss_that_is_not_finite_is_skipped_counted_and_then_stops():
    model = build("gpt2")
    before, optimizer = snapshot(model), ZeroOrderOptimizer(model, lr=1.0, max_skipped=3)
    for value in (float("nan"), float("inf")):
        optimizer.step(lambda value=value: value)
    assert (optimizer.skipped_steps, optimizer.steps) == (2, 2)
    with pytest.raises(NonFiniteLoss, match="3 steps in a row"):
        optimizer.step(lambda: float("nan"))
    assert unchanged(model, before)


def test_an_update_that_float16_cannot_hold_is_skipped():
    w = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = ZeroOrderOptimizer([("w", w)], lr=1e4, eps=1e-2)
    optimizer.step(lambda: 100 * w.float().sum())
    assert optimizer.skipped_steps == 1
    assert torch.equal(w.data, torch.ones(4, dtype=torch.float16))


def test_a_saved_state_goes_on_to_the_same_bits():
    def run(model, optimizer, steps):
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        for _ in range(steps):
            optimizer.step(lambda: loss_of(model))
            schedule.step()
        return schedule

    whole = build("llama")
    run(whole, ZeroOrderOptimizer(whole, lr=1e-3, seed=2), 6)
    half = build("llama")
    first = ZeroOrderOptimizer(half, lr=1e-3, seed=2)
    schedule = run(half, first, 3)
    second = ZeroOrderOptimizer(half, lr=1e-3, seed=99)
    later = torch.optim.lr_scheduler.LinearLR(second, 1.0, 0.1, 10)
    second.load_state_dict(first.state_dict())
    later.load_state_dict(schedule.state_dict())
    for _ in range(3):
        second.step(lambda: loss_of(half))
        later.step()
    assert second.forward_passes == 12
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters(), strict=True))


def test_names_decide_the_noise_not_order_grouping_or_dtype():
    def z(params, dtype=torch.float64):
        tensors = {n: nn.Parameter(torch.zeros(9, dtype=dtype)) for n in "abc"}
        optimizer = ZeroOrderOptimizer(params(tensors), lr=1.0, seed=8)
        optimizer.step(lambda: sum(t.double().sum() for t in tensors.values()))
        return {n: (t.data / t.data[0]).double() for n, t in tensors.items()}

    plain = z(lambda t: list(t.items()))
    for other in (
        z(lambda t: list(t.items())[::-1]),
        z(lambda t: [{"params": [("c", t["c"])]}, {"params": [("a", t["a"]), ("b", t["b"])]}]),
        z(lambda t: list(t.items()), torch.float32),
    ):
        for name in "abc":
            torch.testing.assert_close(plain[name], other[name], rtol=1e-5, atol=0)


def test_dropout_is_the_same_in_both_probes():
    model, drop = build("gpt2"), nn.Dropout(0.5).train()
    seen = []
    ZeroOrderOptimizer(model, lr=0.0).step(lambda: (seen.append(drop(torch.ones(64))), loss_of(model))[1])
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zo-sdg"}, "zo-sgd"),
        ({"direction": "gausian"}, "gaussian"),
        ({"engine": "sequental"}, "sequential"),
        ({"estimater": "two-sided"}, "estimator"),
        ({"estimator": "twosided"}, "two-sided"),
        ({"eps": 0.0}, "eps"),
        ({"eps": "1e-3"}, "eps='1e-3': must be a number"),
        ({"lr": "1e-3"}, "lr='1e-3': must be a number"),
        ({"seed": -1}, "seed=-1: must be a whole number from 0"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": "7"}, "seed='7'"),
        ({"lr": -1.0}, "lr"),
        ({"queries": 0}, "queries"),
        ({"groups": 0}, "groups"),
        ({"groups": "row"}, "groups"),
        ({"groups": 4, "engine": "dual"}, "lowrank"),
        ({"estimator": "leave-one-out"}, "queries=1"),
        ({"queries": 2, "method": Method()}, "queries=2: method is an object"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_meant(options, message):
    with pytest.raises(ValueError, match=message):
        ZeroOrderOptimizer(nn.Linear(2, 2), **options)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        ZeroOrderOptimizer(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="int8"):
        ZeroOrderOptimizer([("q", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))])
    with pytest.raises(TypeError, match="closure"):
        ZeroOrderOptimizer(nn.Linear(2, 2)).step()


@pytest.mark.parametrize("batch", [None, {"x": torch.ones(2, 2)}, [{"x": torch.ones(2, 2)}] * 2])
@pytest.mark.parametrize("method", ["zo-sgd", "zo-sgd-cons", "forward-grad", "fo-sgd"])
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda: None, "the closure returned None; it has to return the loss"),
        (lambda: object(), "the closure returned a object"),
        (lambda: torch.ones(0), "the closure returned an empty tensor"),
        (lambda: [], "the closure returned an empty tensor"),
    ],
)
def test_a_closure_without_a_loss_is_named_and_no_skipped_step(batch, method, returned, said):
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    optimizer = ZeroOrderOptimizer(model, method=method)

    def closure(*given):
        model(torch.ones(2))  # the weights are read
        return returned()

    with pytest.raises((TypeError, ValueError), match=said):
        optimizer.step(closure, batch=batch)
    assert torch.equal(model.weight, before)
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 0)
