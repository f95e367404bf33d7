"""All places of a step in as few forwards as a budget of tokens allows: what is evaluated, in which order, to the same losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from families import CAUSAL, V, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer
from zotune.directions import Directions, Displacement
from zotune.engines import following, make_engine
from zotune.engines.places import Copy, Place, Places, repeated
from zotune.step.probing import shares

TOKENS = 7


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, V - 2, (rows, TOKENS), generator=torch.Generator().manual_seed(rows))}


def rows_of(model: nn.Module):
    def losses(batch):
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return losses


def forwards_of(model: nn.Module, optimizer: ZeroOrderOptimizer, rows: int) -> list[int]:
    """Rows of each forward of a step, by a hook; the first step is checked, so the second."""
    seen, loss, batch = [], rows_of(model), batch_of(rows)
    optimizer.step(loss, batch=batch)
    handle = model.register_forward_hook(lambda module, args, out: seen.append(out.logits.shape[0]))
    optimizer.step(loss, batch=batch)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("options", "whole", "half", "passes"),
    [
        ({"estimator": "one-sided", "queries": 2}, [12], [6, 6], 3),
        ({"queries": 3}, [24], [12, 12], 6),
        ({"estimator": "leave-one-out", "queries": 4}, [16], [8, 8], 4),
        ({"queries": 3, "groups": "batch"}, [24], [12, 12], 6),
        ({"queries": 2, "groups": 2, "estimator": "one-sided"}, [12], [6, 6], 3),
        ({"method": "fzoo"}, [36], [18, 18], 9),
        ({}, [8], [4, 4], 2),
    ],
    ids=str,
)
def test_a_step_is_as_few_forwards_as_the_budget_allows(options, whole, half, passes):
    model = build("llama").double()
    found = []
    for forward_tokens, wanted in ((None, whole), (TOKENS * sum(whole), whole), (TOKENS * -(-sum(whole) // 2), half)):
        optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, seed=3, forward_tokens=forward_tokens, **options)
        assert forwards_of(model, optimizer, 4) == wanted
        assert optimizer.forward_passes == 2 * passes == 2 * optimizer.forwards_a_step
        assert optimizer.engine.usable
        found.append(torch.tensor(optimizer.last.losses_P, dtype=torch.float64))
    engine = "lowrank" if "groups" in options else "sequential"
    apart = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, seed=3, engine=engine, **options)
    apart.engine.usable = False
    assert forwards_of(model, apart, 4) == [4] * passes
    for losses in found:
        torch.testing.assert_close(losses, torch.tensor(apart.last.losses_P, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_plain_pair_is_split_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(following, "most_tokens", lambda device: TOKENS)
    model = build("llama").double()
    for options in ({"engine": "dual"}, {"groups": "batch"}):
        assert forwards_of(model, ZeroOrderOptimizer(model, lr=0.0, **options), 4) == [8]
        asked = ZeroOrderOptimizer(model, lr=0.0, forward_tokens=4 * TOKENS, **options)
        assert forwards_of(model, asked, 4) == [4, 4]
    many = ZeroOrderOptimizer(model, lr=0.0, groups="batch", queries=3)
    assert forwards_of(model, many, 4) == [8, 8, 8]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
@given(
    rows=st.integers(1, 5),
    signs=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=5),
    budget=st.integers(1, 30),
    engine=st.sampled_from(["dual", "lowrank", "rows"]),
)
@settings(max_examples=8)
def test_any_places_under_any_budget_have_the_losses_of_separate_forwards(name, rows, signs, budget, engine):
    """Cuts within a copy, directions in any order, θ itself anywhere among them."""
    assert name in CAUSAL
    model = build(name).double()
    optimizer = ZeroOrderOptimizer(model, engine="dual" if engine == "dual" else "lowrank")
    directions = optimizer.engine.directions
    shared = (1,) * rows if engine == "rows" else (1,)
    count = len(signs) * len(shared)
    at = Displacement(tuple(range(40, 40 + count)), ((1e-2,) * count,))
    order = torch.randperm(len(signs), generator=torch.Generator().manual_seed(budget)).tolist()
    copies = tuple(Copy(sign, place * len(shared)) for sign, place in zip(signs, order, strict=True))
    places, loss, batch = Places(at, copies, shared), rows_of(model), batch_of(rows)
    asked, whole = "dual" if engine == "dual" else "lowrank", "batch" if engine == "rows" else 1
    together = make_engine(asked, directions, whole, forward_tokens=budget * TOKENS)
    apart = make_engine(asked, directions, whole)
    apart.usable = False
    ours, theirs = together.losses(loss, batch, places), apart.losses(loss, batch, places)
    assert together.usable, together.why
    assert ours.shape == theirs.shape == (len(signs), rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)


@given(copies=st.integers(1, 6), rows=st.integers(1, 9), data=st.data())
def test_places_are_each_row_of_each_copy_once_in_order(copies, rows, data):
    groups = data.draw(st.integers(1, rows))
    shared = shares(rows, groups)
    found = list(Places(Displacement(), tuple(Copy(1, c * groups) for c in range(copies)), shared).of(rows))
    assert [row for place in found for row in range(place.first, place.last)] == list(range(rows)) * copies
    assert [place.direction for place in found] == list(range(copies * groups))
    if groups > 1:
        assert found[0] == Place(0, shared[0], 0, 1)


@given(rows=st.integers(1, 5), each=st.integers(1, 3), copies=st.integers(1, 4), data=st.data())
def test_a_cut_of_repeated_rows_keeps_what_belongs_to_a_row_together(rows, each, copies, data):
    """All candidates of an example are a row's, whatever the first dimension of a tensor counts."""
    first = data.draw(st.integers(0, rows * copies - 1))
    last = data.draw(st.integers(first + 1, rows * copies))
    batch = {
        "ids": torch.arange(rows * each * 2).view(-1, 2),
        "labels": torch.arange(rows),
        "n": torch.tensor(3),
        "s": "x",
    }
    cut = repeated(batch, first, last)
    wanted = [i % rows for i in range(first, last)]
    assert cut["labels"].tolist() == wanted
    assert torch.equal(cut["ids"], batch["ids"].view(rows, -1)[wanted].view(-1, 2))
    assert cut["n"] is batch["n"]
    assert cut["s"] == "x"


@pytest.mark.parametrize("engine", ["dual", "lowrank"])
def test_dropout_is_the_same_at_all_places(engine):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out != 0))
    optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-3, engine=engine, estimator="one-sided", queries=3)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step(lambda batch: model(batch["x"]).square().mean(1), batch={"x": x})
    last = seen[-4:]
    assert all(torch.equal(last[0], mask) for mask in last)


def test_one_sided_and_leave_one_out_go_with_a_direction_for_each_row():
    """ĝ of row i is Σ over its own directions, each weighed by that row's losses alone."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    loss = lambda batch: model(batch["x"])[:, 0].square()  # noqa: E731
    for estimator, queries in (("one-sided", 3), ("leave-one-out", 4)):
        optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-4, groups="batch", estimator=estimator, queries=queries)
        optimizer.step(loss, batch={"x": x})
        losses = torch.tensor(optimizer.last.losses_P, dtype=torch.float64).view(-1, 5)
        beside = (
            losses[1:] - losses[0] if estimator == "one-sided" else queries / (queries - 1) * (losses - losses.mean(0))
        )
        g = torch.tensor(optimizer.last.g_GQ[0], dtype=torch.float64).view(-1, 5)
        torch.testing.assert_close(g, beside / 1e-4, rtol=1e-9, atol=1e-9)


def test_leave_one_out_is_unbiased_on_a_quadratic():
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean, n, start = torch.zeros(3, dtype=torch.float64), 1500, w.detach().clone()
    for seed in range(n):
        with torch.no_grad():
            w.copy_(start)
        optimizer = ZeroOrderOptimizer([("w", w)], "leave-one-out", lr=1.0, eps=1e-3, seed=seed, queries=4)
        optimizer.step(lambda: (scale * w**2).sum() / 2)
        mean += (start - w.detach()) / n
    gradient = scale * start
    spread = (1.5 * (gradient.norm() ** 2 + gradient**2) / 4 / n).sqrt()  # of the mean's elements, with room
    assert ((mean - gradient).abs() < 4 * spread).all()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_low_rank_term_is_the_product_of_contiguous_factors_to_the_bit(rank):
    """As it was before places: a product with a transposed view may round otherwise."""
    model, x = nn.Linear(48, 40, bias=False), torch.randn(4, 9, 48, generator=torch.Generator().manual_seed(0))
    engine = make_engine("lowrank", Directions([list(model.named_parameters())]), groups="batch", rank=rank)
    at = Displacement((1, 2, 3, 4), ((1e-3,) * 4,))
    places = Places(at, (Copy(1), Copy(-1)), (1,) * 4)
    found = engine.losses(lambda batch: model(batch["x"]).square().mean((1, 2)), {"x": x}, places)
    u_QOR, v_QDR = engine.factored.drawn(at).of[id(model.weight)]
    in_PDR, out_PRO = v_QDR.repeat(2, 1, 1), u_QOR.transpose(1, 2).repeat(2, 1, 1)
    scale_P = torch.tensor([1e-3] * 4 + [-1e-3] * 4) / math.sqrt(rank)
    y = F.linear(x.repeat(2, 1, 1), model.weight.detach())
    y.baddbmm_(torch.bmm(x.repeat(2, 1, 1), in_PDR) * scale_P[:, None, None], out_PRO)
    assert torch.equal(found.flatten(), y.square().mean((1, 2)))
