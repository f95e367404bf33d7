"""Updates that dual holds back: the bits are those of updates that are not, whatever happens between."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from families import V, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer
from zotune.engines import dual as dual_engine
from zotune.record.trajectory import Record
from zotune.step import graphs
from zotune.step.captured import CapturedSteps

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
READS = ["llama", "opt", "gpt2", "deberta"]  # tied heads, biases, weights that no linear map reads, whole tables


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """As models of real size have them: matrices are not among the small parameters, and go by several tiles."""
    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 512)
    monkeypatch.setattr(dual_engine, "NARROW", 0)
    monkeypatch.setattr(dual_engine, "TILE_BYTES", 4096)
    monkeypatch.setattr(dual_engine, "ALIGNED", 8)


def batch_of(rows: int, tokens: int = 6) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, V - 2, (rows, tokens), generator=torch.Generator().manual_seed(rows))}


class RowLoss:
    """A loss a row; `spoil` is called with the losses."""

    def __init__(self, model, spoil=None):
        self.model, self.spoil = model, spoil

    def __call__(self, batch):
        ids, masked = batch["input_ids"], self.model.config.model_type == "deberta-v2"
        logits = self.model(input_ids=ids, **({} if masked else {"use_cache": False})).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        return losses if self.spoil is None else self.spoil(losses)


def pair(name="llama", dtype=torch.float32, **options):
    """Two equal models, under an optimizer that holds updates back and one that does not."""
    models = [build(name).to(dtype) for _ in range(2)]
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 3, "engine": "dual"} | options
    holds, direct = (ZeroOrderOptimizer(model, **options) for model in models)
    assert holds.engine.writer.holds
    direct.engine.writer.may = False
    return models, (holds, direct)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def steps(models, optimizers, count: int, rows=(3, 4, 2)) -> None:
    for step in range(count):
        losses = [o.step(RowLoss(m), batch=batch_of(rows[step % 3])) for m, o in zip(models, optimizers, strict=True)]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", READS)
def test_held_updates_give_the_bits_of_direct_ones(name, dtype, direction, queries):
    models, optimizers = pair(name, dtype, direction=direction, queries=queries)
    steps(models, optimizers, 3)
    assert optimizers[0].engine.usable
    assert not same(*models)  # the last update waits
    optimizers[0].settle()
    assert same(*models)
    assert not same(models[0], build(name).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replay_by_separate_forwards_gives_the_bits_of_held_updates(dtype):
    (model, _), (optimizer, _) = pair("opt", dtype)
    rebuilt = build("opt").to(dtype)
    again = ZeroOrderOptimizer(rebuilt, lr=0.0, eps=1e-2, seed=3, engine="sequential")
    for _ in range(4):
        optimizer.step(RowLoss(model), batch=batch_of(3))
        last = optimizer.last
        again.apply_record(Record(last.step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped))
    optimizer.flush()
    assert same(model, rebuilt)


@given(what=st.lists(st.sampled_from(["step", "step", "settle", "state", "record", "closure", "nan"]), max_size=8))
@settings(max_examples=12, deadline=None)
def test_whatever_comes_between_steps(what):
    models, optimizers = pair(max_skipped=9)
    for i, event in enumerate(what):
        for model, optimizer in zip(models, optimizers, strict=True):
            if event == "step":
                optimizer.step(RowLoss(model), batch=batch_of(2 + i % 3))
            elif event == "settle":
                optimizer.settle()
            elif event == "state":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif event == "record":
                optimizer.apply_record(Record(optimizer.steps, 0.0, 0.0, (0.3,), (1e-2,), (0.0,), False))
            elif event == "closure":
                optimizer.step(lambda m=model: RowLoss(m)(batch_of(2)).mean())
            else:
                optimizer.step(RowLoss(model, lambda losses: losses * float("nan")), batch=batch_of(2))
        if event != "step":
            if event == "nan":  # the update before it may wait still
                optimizers[0].settle()
            assert same(*models)
    optimizers[0].flush()
    assert same(*models)
    assert optimizers[0].skipped_steps == what.count("nan")


class Stop(Exception):
    pass


class Reads(torch.overrides.TorchFunctionMode):
    """Raises at the n-th call of a torch function."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise Stop
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_raises_anywhere_loses_and_doubles_nothing(dtype):
    models, optimizers = pair("opt", dtype)
    steps(models, optimizers, 1)
    raised = 0
    for calls in range(0, 400, 17):  # a later call each time
        ours = RowLoss(models[0])

        def loss(batch, ours=ours, calls=calls):
            with Reads(calls):
                return ours(batch)

        try:
            optimizers[0].step(loss, batch=batch_of(3))
        except Stop:
            raised += 1
            partly = {p: optimizers[0].engine.waiting.of(p) is not None for p in models[0].parameters()}
            if calls > 60:
                assert {*partly.values()} == {True, False}
            steps(models, optimizers, 1)
        else:
            optimizers[1].step(RowLoss(models[1]), batch=batch_of(3))
            break
    assert raised > 5
    optimizers[0].settle()
    assert same(*models)


def test_a_product_that_raises_between_tiles_loses_and_doubles_nothing(monkeypatch):
    models, optimizers = pair("llama")
    steps(models, optimizers, 1)
    bmm, left = torch.bmm, [6]

    def raising(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return bmm(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", raising)
    for n in range(3, 20):
        left[0] = n
        with pytest.raises(torch.OutOfMemoryError):
            optimizers[0].step(RowLoss(models[0]), batch=batch_of(3))
        waiting = optimizers[0].engine.waiting
        if any(waiting.row(p) for p in models[0].parameters()):
            break
    else:
        pytest.fail("no product was cut short")
    monkeypatch.undo()
    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 512)
    monkeypatch.setattr(dual_engine, "NARROW", 0)
    steps(models, optimizers, 2)
    optimizers[0].settle()
    assert same(*models)


def test_an_engine_that_steps_aside_has_written_what_it_held():
    models, optimizers = pair()
    steps(models, optimizers, 2)
    mixing = [RowLoss(m, lambda losses: losses.mean()) for m in models]  # one number for all rows
    for loss, optimizer in zip(mixing, optimizers, strict=True):
        optimizer.step(loss, batch=batch_of(3))
        assert not optimizer.engine.usable
    assert same(*models)


def test_loaded_weights_do_not_take_an_update_that_was_held_for_others():
    (model, _), (optimizer, _) = pair()
    optimizer.step(RowLoss(model), batch=batch_of(3))
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict())[::-1])
    optimizer.settle()
    saved = copy.deepcopy(model.state_dict())
    for first in (0, 1):
        optimizer.step(RowLoss(model), batch=batch_of(3))
        loads = [lambda: model.load_state_dict(saved), lambda: optimizer.load_state_dict(states[0])]
        for load in (loads[first], loads[1 - first]):
            load()
        optimizer.settle()
        assert all(torch.equal(a, b) for a, b in zip(saved.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{"engine": "auto"}, {"engine": "sequential"}])
def test_weights_are_current_after_each_step_of_other_engines(options):
    models, _ = pair()
    first, second = (ZeroOrderOptimizer(m, lr=1e-2, seed=3, **options) for m in models)
    first.step(RowLoss(models[0]), batch=batch_of(3))
    second.step(RowLoss(models[1]), batch=batch_of(3))
    second.settle()
    assert same(*models)
    assert not same(models[0], build("llama"))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"rounding": "compensated"},
        {"fold_every": 2},
        {"method": "zo-sgd-cons"},
        {"method": "zo-adam"},
    ],
)
def test_what_is_more_than_a_list_of_coefficients_has_the_same_bits_too(options):
    models, optimizers = pair(dtype=torch.bfloat16, **options)
    steps(models, optimizers, 4)
    for optimizer in optimizers:
        optimizer.flush()
    assert same(*models)
    assert not same(models[0], build("llama").bfloat16())


def test_parameters_added_later_find_the_others_current():
    models, optimizers = pair()
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.step(RowLoss(model), batch=batch_of(3))
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    assert same(*models)


@pytest.fixture
def replayed(monkeypatch):
    """A graph is replayed by doing again what it was captured from, whatever the host believes, so that its logic runs without
    a GPU."""

    def captured(self, held, device):
        waiting, before = self.engine.waiting, copy.deepcopy(list(self.engine.directions.params))
        held.run()
        assert all(torch.equal(a, b) for a, b in zip(before, self.engine.directions.params, strict=True))

        def replay():
            host = waiting.by, waiting._lacking
            if held.holds:
                waiting.by, waiting._lacking = waiting._places, {id(p): 0 for p in self.engine.directions.params}
            held.run()
            waiting.by, waiting._lacking = host

        held.graph = SimpleNamespace(replay=replay)
        return True

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(graphs.StepGraphs, "_captured", captured)
    step = CapturedSteps.step

    def as_on_cuda(self, *given):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            graph_step = graphs.StepGraphs.step

            def without(*args):
                patch.undo()
                return graph_step(*args)

            patch.setattr(graphs.StepGraphs, "step", without)
            return step(self, *given)

    monkeypatch.setattr(CapturedSteps, "step", as_on_cuda)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_of_several_shapes_share_what_waits(replayed, dtype, queries):
    models, optimizers = pair("opt", dtype, queries=queries)
    optimizers[1].captured.wanted = False
    losses = [RowLoss(model) for model in models]
    spoiled = [RowLoss(model, lambda losses: losses * float("inf")) for model in models]
    for step in range(14):
        chosen = spoiled if step in (4, 9) else losses
        batch = batch_of(2 + step % 3)
        batch = [batch, batch] if step in (6, 11) else batch  # not captured
        for loss, optimizer in zip(chosen, optimizers, strict=True):
            optimizer.step(loss, batch=batch)
        if step in (2, 7):
            optimizers[0].settle()
            assert same(*models)
    assert len(optimizers[0].captured.graphs) > 3
    assert optimizers[0].skipped_steps == 2
    assert not same(*models)
    optimizers[0].flush()
    assert same(*models)
