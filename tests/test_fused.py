"""The rules' passes on CUDA against the same rules tile by tile in torch; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import Directions
from zotune.record.scalars import shrinkage
from zotune.record.steps import StepRecord
from zotune.updates import STATE_DTYPES, Adam, Momentum, Rule, Sgd, Sign
from zotune.updates import rule as rules

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 7), (41, 27), (1,), (0, 3), (4, 8), (9, 8)]
RULES = {"sign": Sign, "momentum": Momentum, "adam": Adam}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Triton's noise everywhere; of the shapes one is too large to share a launch."""
    from zotune.updates import fused

    monkeypatch.setenv("ZOTUNE_NOISE_BACKEND", "cuda")
    monkeypatch.setattr(fused, "FEW", 1000)


def made(dtype: torch.dtype, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the shapes, the first at an odd address, the last stored transposed."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in SHAPES]
    tensors[0] = torch.cat([tensors[0].new_zeros(1), tensors[0].view(-1)])[1:].view(SHAPES[0])
    tensors[-1] = tensors[-1].t()
    return [(f"p{i}", nn.Parameter(t, requires_grad=False)) for i, t in enumerate(tensors)]


def directions_of(named: list[tuple[str, nn.Parameter]], direction: str) -> Directions:
    return Directions([named[:2], named[2:]], direction)


def taken(seeds_Q, g_GQ, lr_G, decay_G) -> StepRecord:
    return StepRecord(0, seeds_Q, (), g_GQ, lr_G, decay_G)


def apply(rule: Rule, directions: Directions, by: StepRecord, state: dict, tiles: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if tiles:
            patch.setattr(rules, "passes_for", lambda directions: None)
        rule.apply(directions, by, state)


def close(ours: torch.Tensor, theirs: torch.Tensor, eps: float) -> None:
    """To a few roundings: sums may be fused, and the interpreter truncates to bfloat16 where a device rounds."""
    torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * min(eps, 1e-3))


KINDS = [
    (3, "gaussian", "float32", "nearest"),
    (1, "gaussian", "parameter", "compensated"),
    (3, "rademacher", "bfloat16", "nearest"),
]
ALONG = [
    (name, *KINDS[(i + j) % 3][2:], dtype) for i, name in enumerate([*RULES, "sgd"]) for j, dtype in enumerate(DTYPES)
]
CASES = [(name, *KINDS[(i + j) % 3], dtype) for i, name in enumerate(RULES) for j, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(("name", "queries", "direction", "state_dtype", "rounding", "dtype"), CASES, ids=str)
def test_a_pass_is_the_rule_tile_by_tile(name, queries, direction, state_dtype, rounding, dtype):
    rule = RULES[name](state_dtype=state_dtype, rounding=rounding)
    ours, theirs = made(dtype), made(dtype)
    before = [p.clone() for _, p in ours]
    ours_state, theirs_state = ({p: {} for _, p in named} for named in (ours, theirs))
    for step in range(2):
        g_Q = tuple(0.3 * (q + 1) * (-1) ** (q + step) for q in range(queries))
        by = taken(tuple(noise.step_seed(7, step, q) for q in range(queries)), (g_Q, g_Q), (0.01, 0.02), (0.5, 0.0))
        apply(rule, directions_of(ours, direction), by, ours_state, tiles=False)
        apply(rule, directions_of(theirs, direction), by, theirs_state, tiles=True)
    for (_, p), (_, q), w in zip(ours, theirs, before, strict=True):
        own, other = ours_state[p], theirs_state[q]
        eps = max(torch.finfo(t.dtype).eps for t in (p, *(own[name] for name in rule.buffers)))
        assert own.keys() == other.keys()
        assert own["steps"] == other["steps"] == 2
        for buffer in rule.buffers:
            assert own[buffer].dtype == other[buffer].dtype
            close(own[buffer], other[buffer], eps)
        close(p, q, eps)
        assert p.numel() < 2 or not torch.equal(p, w)
        if (
            rounding == "compensated" and eps > 1e-4
        ):  # w may have rounded up in one and down in the other; with the rest it agrees
            error = (p.double() + own["residual"] - q.double() - other["residual"]).abs()
            assert (error <= 16 * eps * (0.02 + eps * q.abs())).all()  # of what moved, and of the residual


@pytest.mark.parametrize(("name", "state_dtype", "rounding", "dtype"), ALONG, ids=str)
def test_a_pass_along_a_gradient_is_the_rule_s_descent_tile_by_tile(name, state_dtype, rounding, dtype, monkeypatch):
    from zotune.updates import fused

    rule = (RULES | {"sgd": Sgd})[name](state_dtype=state_dtype, rounding=rounding)
    monkeypatch.setattr(type(rule), "_by_torch", lambda *args: False)
    ours, theirs = made(dtype), made(dtype)
    before = [p.clone() for _, p in ours]
    ours_state, theirs_state = ({p: {} for _, p in named} for named in (ours, theirs))
    draw = torch.Generator().manual_seed(5)
    goes = torch.ones((), dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        slopes = [torch.randn(p.shape, generator=draw).to(DEVICE, dtype) for _, p in ours]
        rule.descend([p for _, p in theirs], slopes, 0.01, 0.5, theirs_state)
        rule.reserve([p for _, p in ours], ours_state)
        for (_, p), slope in zip(ours, slopes, strict=True):
            numbers = rules.table(rule.numbers_of((0.01,), (0.5,), [ours_state[p].get("steps", 0)])).to(DEVICE)
            fused.descend(rule, p, slope, ours_state[p], numbers[0], goes * 0)  # changes nothing
            fused.descend(rule, p, slope, ours_state[p], numbers[0], goes)
        rule.count([p for _, p in ours], ours_state)
    for (_, p), (_, q), w in zip(ours, theirs, before, strict=True):
        own, other = ours_state[p], theirs_state[q]
        eps = max(torch.finfo(t.dtype).eps for t in (p, *(own[name] for name in rule.buffers)))
        assert own.keys() == other.keys()
        assert own["steps"] == other["steps"] == 2
        for buffer in rule.buffers:
            close(own[buffer], other[buffer], eps)
        close(p, q, eps)
        assert p.numel() < 2 or not torch.equal(p, w)


def test_a_rule_with_a_move_of_its_own_inherits_no_kernel():
    class Nesterov(Momentum):
        def move(self, w_n, g_n, state, lr, steps):
            return super().move(w_n, g_n, state, lr, steps) - lr * g_n

    class Renamed(Momentum):
        pass

    assert (Nesterov().kernel, Nesterov().capturable) == ("", False)
    assert (Renamed().kernel, Renamed().capturable) == ("momentum", True)
    named = made(torch.float32)[:1]
    state = {p: {} for _, p in named}
    apply(Nesterov(), Directions([named], "gaussian"), taken((1,), ((1.0,),), (0.1,), (0.0,)), state, tiles=False)
    (_, p), (_, w) = named[0], made(torch.float32)[0]
    torch.testing.assert_close(p.data, w - 0.2 * state[p]["m"])


@pytest.mark.parametrize("name", RULES)
def test_an_lr_of_zero_moves_the_state_alone_and_a_step_that_does_not_go_nothing(name):
    from zotune.updates import fused

    rule = RULES[name](rounding="compensated")
    named = made(torch.bfloat16)
    directions, state = directions_of(named, "gaussian"), {p: {} for _, p in named}
    by = taken((3,), ((0.7,), (0.7,)), (0.0, 0.0), (0.1, 0.1))
    apply(rule, directions, by, state, tiles=False)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, made(torch.bfloat16), strict=True))
    assert all(bool(state[p][buffer].any()) for _, p in named if p.numel() for buffer in rule.buffers)
    before = copy.deepcopy(list(state.values()))
    numbers = rules.table(rule.numbers_of((0.1, 0.1), (0.1, 0.1), (1, 1))).to(DEVICE)
    seeds, g = torch.tensor([5], device=DEVICE), torch.ones(2, 1, device=DEVICE)
    passes = fused.update_of(rule, directions, state)
    assert passes is fused.update_of(rule, directions, state)
    passes.run(seeds, g, numbers, torch.zeros((), dtype=torch.int32, device=DEVICE))
    for own, then in zip(state.values(), before, strict=True):
        assert all(torch.equal(own[buffer], then[buffer]) for buffer in rule.kept_names)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, made(torch.bfloat16), strict=True))
    passes.run(seeds, g, numbers)
    assert not torch.equal(named[0][1], made(torch.bfloat16)[0][1])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_decay_alone_has_the_bits_of_a_product(dtype):
    from zotune.updates import fused

    named, wanted = made(dtype), [p.data for _, p in made(dtype)]
    directions = directions_of(named, "gaussian")
    table = rules.table(Momentum().numbers_of((0.5, 0.5), (0.31, 0.0), (0, 0))).to(DEVICE)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    fused.Update(rules.DECAY, directions, {}, ()).run(nothing, torch.empty(2, 0, device=DEVICE), table)
    for (_, p), w in zip(named[:2], wanted[:2], strict=True):
        w.mul_(shrinkage(0.5, 0.31))
        # the interpreter truncates to 16 bits where a device rounds
        torch.testing.assert_close(p.data, w, rtol=torch.finfo(dtype).eps if DEVICE == "cpu" else 0, atol=0)
    assert all(torch.equal(p, w) for (_, p), w in zip(named[2:], wanted[2:], strict=True))


@settings(max_examples=15)
@given(
    n=st.integers(1, 300),
    queries=st.integers(1, 4),
    name=st.sampled_from(sorted(RULES)),
    direction=st.sampled_from(noise.DIRECTIONS),
    state_dtype=st.sampled_from(STATE_DTYPES[::2]),
    lr=st.floats(0, 1, width=32),
    decay=st.floats(0, 1, width=32),
    steps=st.integers(0, 5000),
    g=st.floats(-100, 100, width=32),
)
def test_any_tile_moves_as_the_rule_says(n, queries, name, direction, state_dtype, lr, decay, steps, g):
    """float32, from a state that is not zero."""
    rule = RULES[name](state_dtype=state_dtype)
    draw = torch.Generator().manual_seed(n)
    w, *start = (torch.randn(n, generator=draw).to(DEVICE) for _ in range(3))
    by = taken(tuple(range(queries)), ((g,) * queries,), (lr,), (decay,))
    found = []
    for tiles in (False, True):
        param = nn.Parameter(w.clone(), requires_grad=False)
        buffers = {buffer: t.abs() for buffer, t in zip(rule.buffers, start, strict=False)}
        state = {param: {buffer: t.clone() for buffer, t in buffers.items()} | {"steps": steps}}
        apply(rule, Directions([[("w", param)]], direction), by, state, tiles)
        found.append((param.data, *(state[param][buffer] for buffer in rule.buffers)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "sparsity", [{"mask": "random"}, {"mask": "magnitude", "mask_refresh": 1}], ids=lambda s: s["mask"]
)
def test_a_masked_pass_is_the_rule_tile_by_tile(sparsity, monkeypatch):
    from zotune.updates import fused

    monkeypatch.setattr(fused, "SPAN", 512)
    weights = []
    for tiles in (False, True):
        named = made(torch.float32)[:2]
        with pytest.MonkeyPatch.context() as patch:
            if tiles:
                patch.setattr(rules, "passes_for", lambda directions: None)
            options = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "sparsity": 0.5} | sparsity
            optimizer = ZeroOrderOptimizer(named, "zo-adam", **options)
            for _ in range(2):
                optimizer.step(lambda: sum((p.double() ** 2).sum() for _, p in named))  # noqa: B023
        weights.append([p.data for _, p in named])
    for p, q, (_, w) in zip(*weights, made(torch.float32)[:2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert p.numel() < 2 or not torch.equal(p, w)
