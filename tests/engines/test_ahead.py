"""Copies that are made ahead of their product: the bits are those of copies made when they are asked for.

Without a GPU a branch is one whose work is done and hidden: until it is joined its copies are NaN, and the rows of the weight
whose update it writes too.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from families import V, build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer
from zotune.engines import ahead
from zotune.engines import dual as dual_engine


class Hidden:
    """What was made comes to light when it is joined."""

    made = 0

    def __init__(self, device):
        pass

    def run(self, make, tile, copies):
        Hidden.made += 1
        rows = tile.weight.data[tile.first : tile.last]
        before = rows.clone()
        make(tile, copies)
        after = [(copies, copies.clone())]
        copies.fill_(math.nan)
        if not torch.equal(rows, before):
            after.append((rows, rows.clone()))
            rows.fill_(math.nan)
        return after

    def join(self, after):
        for tensor, value in after:
            tensor.copy_(value)


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    monkeypatch.setattr(ahead, "capturing", lambda: True)
    monkeypatch.setattr(ahead, "Branch", Hidden)
    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 512)
    monkeypatch.setattr(dual_engine, "NARROW", 0)
    monkeypatch.setattr(dual_engine, "TILE_BYTES", 4096)
    monkeypatch.setattr(dual_engine, "ALIGNED", 8)
    Hidden.made = 0


def pair(model, **options):
    """Equal models under optimizers of which the second makes nothing ahead."""
    models = [model, copy.deepcopy(model)]
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 3, "engine": "dual"} | options
    first, second = (ZeroOrderOptimizer(m, **options) for m in models)
    second.engine.ahead._ahead = lambda index: False
    return models, (first, second)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def step(models, optimizers, loss, batch) -> None:
    found = [o.step(lambda b, m=m: loss(m, b), batch=batch) for m, o in zip(models, optimizers, strict=True)]
    assert torch.isfinite(found[0])
    assert torch.equal(*found)


def language(model, batch):
    ids = batch["input_ids"]
    masked = model.config.model_type == "deberta-v2"
    logits = model(input_ids=ids, **({} if masked else {"use_cache": False})).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "deberta"])  # tied heads, tables, products of other kinds
def test_a_model_s_steps_have_the_same_bits(name, dtype, queries):
    models, optimizers = pair(build(name).to(dtype), queries=queries)
    draw = torch.Generator().manual_seed(0)
    for rows in (3, 3, 2, 3):
        step(models, optimizers, language, {"input_ids": torch.randint(2, V - 2, (rows, 6), generator=draw)})
    assert optimizers[0].engine.usable
    assert Hidden.made > (0 if name == "gpt2" else 8)  # whose maps are no `linear`, but for the head
    for optimizer in optimizers:
        optimizer.settle()
    assert same(*models)


def test_all_tiles_but_the_first_of_a_forward_are_made_ahead():
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 24))
    models, optimizers = pair(model)
    batch = {"x": torch.randn(4, 40)}
    loss = lambda m, b: m(b["x"]).square().mean(1)  # noqa: E731
    step(models, optimizers, loss, batch)
    tiles = len(optimizers[0].engine.ahead._order)
    assert tiles > 3
    Hidden.made = 0
    passes = []  # of an update by itself, which the copies' making takes along
    optimizers[0].engine.waiting.directions.displaced_span = lambda *args: passes.append(args)
    step(models, optimizers, loss, batch)
    assert Hidden.made == tiles - 1
    assert not passes


class Mixed(nn.Module):
    """Its products come in the order that a step asks for; a look-up and a function of a whole weight may come between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(40, 40, bias=i == 1) for i in range(3))
        self.order: list[str] = []

    def forward(self, x, ids):
        for what in self.order:
            weight = self.maps[int(what[1])].weight
            if what[0] == "p":
                x = torch.tanh(self.maps[int(what[1])](x))
            elif what[0] == "e":
                x = x + nn.functional.embedding(ids, weight)
            else:
                x = x + torch.einsum("nd,od->no", x, weight) / 40
        return x


ORDERS = st.lists(st.sampled_from(["p1", "e0", "e1", "e2", "w1"]), max_size=4).flatmap(
    lambda more: st.permutations(["p0", "p1", "p2", *more])
)


@example(orders=[["p0", "p1", "p2"], ["p0", "w1", "p1", "p2"], ["p0", "p1", "p2"], ["p0", "e1", "p1", "p2"]])
@settings(max_examples=40, deadline=None)
@given(orders=st.lists(ORDERS, min_size=1, max_size=4))
def test_whatever_comes_next(orders):
    models, optimizers = pair(Mixed())
    batch = {"x": torch.randn(3, 40), "ids": torch.tensor([0, 39, 7])}
    for order in [["p0", "p1", "p2"], *orders]:
        for model in models:
            model.order = order
        step(models, optimizers, lambda m, b: m(b["x"], b["ids"]).square().mean(1), batch)
    assert optimizers[0].engine.usable
    for optimizer in optimizers:
        optimizer.settle()
    assert same(*models)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 8, 2))
def test_a_forward_that_raises_loses_nothing(at):
    """Nothing that was being made is left behind, whether or not anybody waited for it."""
    models, optimizers = pair(Mixed())
    batch = {"x": torch.randn(3, 40), "ids": torch.tensor([0, 39, 7])}
    loss = lambda m, b: m(b["x"], b["ids"]).square().mean(1)  # noqa: E731
    for model in models:
        model.order = ["p0", "p1", "p2"]
    step(models, optimizers, loss, batch)
    left = [at]

    class Raises(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            left[0] -= 1
            if left[0] == 0:
                raise Stop
            return func(*args, **(kwargs or {}))

    def raising(b):
        with Raises():
            return loss(models[0], b)

    with pytest.raises(Stop):
        optimizers[0].step(raising, batch=batch)
    step(models, optimizers, loss, batch)
    for optimizer in optimizers:
        optimizer.settle()
    assert same(*models)
