"""Engines that compute all parts in one forward give what copies with really displaced weights give, row by row."""

from __future__ import annotations

import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from families import CAUSAL, MASKED, V, both, build, snapshot, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import Displacement, signed
from zotune.engines import dual
from zotune.noise import reference
from zotune.step.probing import shares

FAMILIES = [*CAUSAL, *MASKED]


def batch_of(rows: int, tokens: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, V - 2, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids}


def row_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["input_ids"]
    extra = {} if model.config.model_type in MASKED else {"use_cache": False}
    logits = model(input_ids=ids, **extra).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)


def draw(name: str, shape: tuple[int, ...], seed: int, direction: str) -> torch.Tensor:
    out = torch.zeros(math.prod(shape), dtype=torch.float64)
    reference.add_noise(out, out, torch.tensor([signed(seed)]), torch.ones(1), noise.parameter_id(name), direction)
    return out.view(shape)


def low_rank(name: str, param: torch.Tensor, seed: int, rank: int, direction: str) -> torch.Tensor:
    """z of a parameter, written down."""
    rows, width = param.shape[0], param.numel() // param.shape[0]
    if param.dim() < 2 or rank >= min(rows, width):
        return draw(name, tuple(param.shape), seed, direction)
    u = draw(f"{name}.U", (rows, rank), seed, direction)
    v = draw(f"{name}.V", (width, rank), seed, direction)
    return (u @ v.t() / rank**0.5).view(param.shape)


def moved(model: nn.Module, seed: int, coef: float, rank: int, direction: str = "gaussian") -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in other.named_parameters():
            param += coef * low_rank(name, param, seed, rank, direction)
    return other


@pytest.mark.parametrize("direction", noise.DIRECTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_dual_gives_the_losses_of_two_forwards(name, direction):
    model = build(name).double()
    before = snapshot(model)
    dual, plain = (ZeroOrderOptimizer(model, direction=direction, engine=e).engine for e in ("dual", "sequential"))
    at, batch = Displacement((77,), ((1e-2,),)), batch_of(3)
    ours = both(dual, lambda b: row_losses(model, b), batch, at)
    theirs = both(plain, lambda b: row_losses(model, b), batch, at)
    assert dual.usable
    assert dual.forwards == 2
    assert unchanged(model, before)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_dual_in_narrow_formats(name, dtype):
    model = build(name).to(dtype)
    dual, plain = (ZeroOrderOptimizer(model, engine=e).engine for e in ("dual", "sequential"))
    at, batch = Displacement((5,), ((1e-2,),)), batch_of(4)
    ours = both(dual, lambda b: row_losses(model, b).float(), batch, at)
    theirs = both(plain, lambda b: row_losses(model, b).float(), batch, at)
    assert dual.usable
    torch.testing.assert_close(ours, theirs, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_dual_adds_a_bias_within_the_product_as_after_it(monkeypatch):
    from zotune.engines import dual as dual_engine

    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 2048)  # under the matrices
    monkeypatch.setattr(dual_engine, "NARROW", 0)
    model, at, batch = build("opt").double(), Displacement((77,), ((1e-2,),)), batch_of(3)
    found, asked = [], set()
    for within in (True, False):

        def plan(weight, n, has_bias, on_card=None, within=within):
            asked.add(has_bias)
            return weight.shape[0], within and has_bias

        monkeypatch.setattr(dual_engine, "plan", plan)
        engine = ZeroOrderOptimizer(model, engine="dual").engine
        found.append(both(engine, lambda b: row_losses(model, b), batch, at))
        assert engine.usable
    assert asked == {True, False}
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("outputs", [2048, 8192])
def test_a_bias_is_within_the_product_where_that_costs_less(outputs):
    def weight(width, is_cuda=True):
        count = outputs * width
        return SimpleNamespace(shape=(outputs, width), numel=lambda: count, element_size=lambda: 2, is_cuda=is_cuda)

    assert dual.plan(weight(2048), 4096, True) == (outputs, True)
    assert dual.plan(weight(2048), 4096, False) == (min(outputs, 4096), False)
    assert dual.plan(weight(2048, is_cuda=False), 4096, True) == (min(outputs, 4096), False)
    assert dual.plan(weight(2048), 256, True)[1] is False  # two products would not fill a GPU
    rows, within = dual.plan(weight(20480), 4096, True)  # the copies would cost more than the bias
    assert not within
    assert rows % 128 == 0
    assert rows < outputs


@given(
    outputs=st.integers(1, 60_000),
    width=st.sampled_from([768, 2048, 5120, 20480]),
    n=st.integers(1, 8192),
    has_bias=st.booleans(),
)
def test_a_tile_on_a_gpu_is_whole_rounds_of_blocks_and_of_bounded_memory(outputs, width, n, has_bias):
    count = outputs * width
    weight = SimpleNamespace(shape=(outputs, width), numel=lambda: count, element_size=lambda: 2, is_cuda=True)
    rows, within = dual.plan(weight, n, has_bias)
    assert 1 <= rows <= outputs
    assert not within or (has_bias and rows == outputs)
    assert 2 * rows * width <= max(dual.MOST_BYTES, dual.TILE_BYTES + 2 * dual.ALIGNED * width)
    if rows < outputs:
        assert rows % dual.ALIGNED == 0
        blocks = 2 * -(-n // dual.BLOCK) * (rows // dual.BLOCK)  # of outputs, both halves'
        whole = -(-blocks // dual.PROCESSORS) * dual.PROCESSORS
        fewest, _ = dual.plan(weight, n, False, on_card=False)  # rows where no rounds are counted
        assert rows >= fewest
        assert rows == fewest or blocks > whole - dual.ROUNDS * 2 * -(-n // dual.BLOCK)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_sees_its_own_low_rank_direction(name, rank):
    model = build(name).double()
    before = snapshot(model)
    engine = ZeroOrderOptimizer(model, engine="lowrank", rank=rank, groups="batch").engine
    batch, seeds, eps = batch_of(4), (3, 5, 7, 11), 1e-2
    ours = both(engine, lambda b: row_losses(model, b), batch, Displacement(seeds, ((eps,) * 4,)), (1, 1, 1, 1))
    assert engine.usable
    assert unchanged(model, before)
    for losses, sign in zip(ours, (1, -1), strict=True):
        for i, seed in enumerate(seeds):
            one = {"input_ids": batch["input_ids"][i : i + 1]}
            wanted = row_losses(moved(model, seed, sign * eps, rank), one)
            torch.testing.assert_close(losses[i : i + 1], wanted, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 7), groups=st.integers(1, 5), rank=st.integers(1, 4), signs=st.booleans())
def test_a_low_rank_step_is_the_step_written_down(rows, groups, rank, signs):
    direction = "rademacher" if signs else "gaussian"
    model = build("llama").double()
    base, batch, lr, eps = copy.deepcopy(model), batch_of(rows), 1e-3, 1e-3
    optimizer = ZeroOrderOptimizer(
        model, lr=lr, eps=eps, engine="lowrank", groups=groups, rank=rank, direction=direction, seed=4
    )
    optimizer.step(lambda b: row_losses(model, b), batch=batch)
    wanted = dict(copy.deepcopy(base).named_parameters())
    used = shares(rows, min(groups, rows))
    first = 0
    with torch.no_grad():
        for k, share in enumerate(used):
            seed = noise.step_seed(4, 0, 0, k)
            part = {"input_ids": batch["input_ids"][first : first + share]}
            plus, minus = (row_losses(moved(base, seed, s * eps, rank, direction), part).mean() for s in (1, -1))
            g = float(plus - minus) / (2 * eps)
            for name, param in wanted.items():
                param -= lr * share / rows * g * low_rank(name, param, seed, rank, direction)
            first += share
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, wanted[name], rtol=0, atol=2e-7 * lr * 1e3)
    assert optimizer.forward_passes == 2


def test_micro_batches_are_one_batch():
    models = [build("llama").double() for _ in range(2)]
    whole, (first, second) = batch_of(6), (batch_of(6) for _ in range(2))
    parts = [{"input_ids": first["input_ids"][:4]}, {"input_ids": second["input_ids"][4:]}]
    for model, batch in zip(models, (whole, parts), strict=True):
        optimizer = ZeroOrderOptimizer(model, lr=1e-3, groups="batch", seed=1)
        optimizer.step(lambda b, m=model: row_losses(m, b), batch=batch)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_closure_of_row_losses_is_the_batch():
    models = [build("gpt2").double() for _ in range(2)]
    batch = batch_of(5)
    first, second = (ZeroOrderOptimizer(m, lr=1e-3, groups="batch", seed=1) for m in models)
    first.step(lambda b: row_losses(models[0], b), batch=batch)
    second.step(lambda: row_losses(models[1], batch))
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_short_batch_has_fewer_directions_at_the_same_scale():
    model = build("llama").double()
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, groups="batch", seed=1)
    optimizer.step(lambda b: row_losses(model, b), batch=batch_of(4))
    base = copy.deepcopy(model)
    optimizer.step(lambda b: row_losses(model, b), batch=batch_of(2))
    assert len(optimizer.last.g_GQ[0]) == 4
    assert optimizer.last.g_GQ[0][2:] == (0, 0)
    other = ZeroOrderOptimizer(base, lr=1e-3, groups="batch", seed=1)
    other.param_groups[0]["step"] = 1
    other.step(lambda b: row_losses(base, b), batch=batch_of(2))
    for a, b in zip(model.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_one_number_for_all_rows_is_refused_with_directions_of_their_own():
    model = build("llama")
    optimizer = ZeroOrderOptimizer(model, groups="batch")
    with pytest.raises(ValueError, match="one a row"):
        optimizer.step(lambda b: row_losses(model, b).mean(), batch=batch_of(3))
    with pytest.raises(ValueError, match="each row"):
        optimizer.step(lambda: row_losses(model, batch_of(3)).mean())


class Mixes(nn.Module):
    """Rows see each other: a mean over the batch, which doubling changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")
        self.config = self.inner.config
        self.scale = nn.Parameter(torch.ones(V))

    def forward(self, input_ids: torch.Tensor, **more: object) -> tf.modeling_outputs.CausalLMOutput:
        logits = self.inner(input_ids).logits
        return tf.modeling_outputs.CausalLMOutput(logits=logits - 5 * logits.mean(0) * self.scale)


def test_a_model_that_mixes_rows_is_found_out(caplog):
    model = Mixes().double()
    dual, plain = (ZeroOrderOptimizer(model, engine=e, lr=1e-3, seed=2) for e in ("dual", "sequential"))
    with caplog.at_level(logging.WARNING):
        at = Displacement((7,), ((1e-2,),))
        ours = both(dual.engine, lambda b: row_losses(model, b), batch_of(3), at)
    assert "separate forwards" in caplog.text
    theirs = both(plain.engine, lambda b: row_losses(model, b), batch_of(3), at)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_lora_under_every_engine(tmp_path):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(build("llama").double(), config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(generator=torch.Generator().manual_seed(1))
    at, batch = Displacement((5,), ((1e-2,),)), batch_of(4)
    dual, plain = (ZeroOrderOptimizer(model, engine=e).engine for e in ("dual", "sequential"))
    ours, theirs = (both(e, lambda b: row_losses(model, b), batch, at) for e in (dual, plain))
    assert dual.usable
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer = ZeroOrderOptimizer(model, lr=1e-2, groups="batch")
    optimizer.step(lambda b: row_losses(model, b), batch=batch)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_format_of_a_base_under_an_adapter_counts_in_the_check_of_the_first_batch():
    """Its rounding is in the losses, though no perturbed parameter is in that format."""
    from zotune.models.schemes import get_scheme

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_scheme("lora").prepare(tf.LlamaForCausalLM(config).bfloat16().eval())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = ZeroOrderOptimizer(model, engine="dual", lr=1e-3)

    def rows(batch):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        return losses.mean(1)

    optimizer.step(rows, batch={"input_ids": torch.randint(0, 64, (4, 8))})
    assert optimizer.engine.usable
    assert optimizer.engine._eps == torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("wrong", "dtype", "looks", "usable"),
    [
        # rounding's: as large at any displacement
        (lambda plus, minus: (plus + 0.05, minus - 0.05), torch.bfloat16, 2, True),
        (lambda plus, minus: (plus + 0.05, minus - 0.05), torch.float32, 1, False),  # which has none of that size
        (lambda plus, minus: (plus + 3.0, minus - 3.0), torch.bfloat16, 1, False),
        (lambda plus, minus: (plus.roll(1), minus.roll(1)), torch.bfloat16, 2, False),  # other rows' losses
        (lambda plus, minus: (plus + 2 * (plus - minus), minus), torch.bfloat16, 2, False),
        (lambda plus, minus: (plus * math.nan, minus), torch.bfloat16, 1, False),
    ],
    ids=["rounding", "too exact", "too far", "rows", "scale", "nan"],
)
@pytest.mark.parametrize("engine", ["dual", "lowrank"])
def test_a_first_batch_that_rounding_puts_off_is_looked_at_further_away(
    engine, wrong, dtype, looks, usable, monkeypatch, caplog
):
    """Where a displacement changes losses less than their format rounds them, so that no check can see through."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, eps=1e-2, engine=engine)
    forward = type(optimizer.engine)._forward

    def spoiled(*args):
        plus, minus = wrong(*forward(*args).view(2, -1))
        return torch.cat([plus, minus])

    monkeypatch.setattr(type(optimizer.engine), "_forward", spoiled)
    off, seen = type(optimizer.engine)._off, []
    monkeypatch.setattr(type(optimizer.engine), "_off", lambda *args: seen.append(off(*args)) or seen[-1])
    x = torch.randn(6, 8).to(dtype)
    batch = {"x": x, "before": model(x)[:, 0].detach(), "scale": torch.linspace(1.0, 3.0, 6)}

    def rows(batch):
        return (model(batch["x"])[:, 0] - batch["before"]).float() * batch["scale"]

    optimizer.step(rows, batch=batch)
    assert len(seen) == looks
    assert optimizer.engine.usable == usable
    assert optimizer.forward_passes == 2
    assert ("separate forwards" in caplog.text) != usable


@pytest.mark.parametrize("engine", ["dual", "lowrank"])
def test_a_loss_that_is_finite_beside_the_weights_alone_is_followed(engine):
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    x = torch.randn(6, 8)
    batch = {"x": x, "before": model(x)[:, 0].detach()}
    optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, engine=engine)
    optimizer.step(lambda batch: (model(batch["x"])[:, 0] - batch["before"]).abs().log(), batch=batch)
    assert optimizer.engine.usable, optimizer.engine.why


@pytest.mark.parametrize("engine", ["dual", "lowrank"])
def test_autocast_over_float32_weights_is_followed(engine):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x = torch.randn(4, 8)
    optimizer = ZeroOrderOptimizer(model, lr=1e-2, eps=1e-2, engine=engine)

    def rows(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch["x"]).float().square().mean(1)

    optimizer.step(rows, batch={"x": x})
    assert optimizer.engine.usable, optimizer.engine.why
    assert torch.isfinite(torch.tensor(optimizer.last.losses_P)).all()


def test_a_resumed_run_takes_the_way_that_the_run_took(caplog):
    """The check of a first batch is not made again: on another batch it might come out otherwise, and bits would differ."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x = torch.randn(4, 8)

    def rows(batch):
        return model(batch["x"]).square().mean(1)

    def mixed(batch):  # rows that know of each other
        h = model(batch["x"])
        return (h - h.mean(0)).square().mean(1)

    for loss, usable in ((rows, True), (mixed, False)):
        first = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, engine="dual")
        first.step(loss, batch={"x": x})
        assert first.engine.usable == usable
        second = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, engine="dual")
        second.load_state_dict(first.state_dict())
        second.step(mixed if usable else rows, batch={"x": x})
        assert second.engine.usable == usable


@pytest.mark.parametrize("engine", ["auto", "dual"])
def test_a_loss_that_draws_has_the_same_draws_in_both_probes(engine, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)).train()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    first, second = (ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, engine=e) for e in (engine, "sequential"))
    with caplog.at_level(logging.INFO):
        for optimizer in (first, second):
            torch.manual_seed(7)
            optimizer.step(lambda batch: model(batch["x"]).square().mean(1), batch={"x": x})
    assert first.last.losses_P == second.last.losses_P
    said = [record for record in caplog.records if "dropout" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING if engine == "dual" else logging.INFO]


def test_a_batch_that_cannot_be_doubled_is_served_without_a_warning(caplog):
    """A loss may read what is no tensor, its batch by attribute, or the number of its rows: `auto` must not ask for more."""
    model = torch.nn.Linear(8, 4)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    class Batch(dict):
        x = property(lambda self: self["x"])

    def by_text(batch):
        return torch.stack(
            [row.square().mean() * len(t) for row, t in zip(model(batch["x"]), batch["text"], strict=True)]
        )

    losses = (
        (by_text, {"x": x, "text": ["a", "bb", "ccc"]}),
        (lambda batch: model(batch.x).square().mean(1), Batch(x=x)),
        (lambda batch: model(batch["x"]).square().mean(), {"x": x}),
        (lambda batch: float(model(batch["x"]).square().mean()), {"x": x}),
        (lambda batch: model(batch["x"]).square().mean(1) * torch.arange(3.0), {"x": x}),
    )
    for loss, batch in losses:
        ours, plain = (ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, engine=e) for e in ("auto", "sequential"))
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                for optimizer in (ours, plain):
                    optimizer.step(loss, batch=batch)
                assert ours.last.losses_P == plain.last.losses_P
        assert not ours.engine.usable
        assert ours.forward_passes == plain.forward_passes == 4
    assert not caplog.records


def test_a_closure_that_raises_is_no_reason_to_step_aside():
    model, fails = torch.nn.Linear(8, 4), [True]

    def loss(batch):
        if fails[0]:
            raise KeyError("a bad row")
        return model(batch["x"]).square().mean(1)

    optimizer = ZeroOrderOptimizer(model, lr=0.0)
    with pytest.raises(KeyError):
        optimizer.step(loss, batch={"x": torch.ones(3, 8)})
    fails[0] = False
    optimizer.step(loss, batch={"x": torch.ones(3, 8)})
    assert optimizer.engine.usable
    fails[0] = True
    with pytest.raises(KeyError):
        optimizer.step(loss, batch={"x": torch.ones(3, 8)})
    assert optimizer.engine.usable


def test_what_auto_takes():
    model = torch.nn.Linear(8, 4)
    chosen = [
        ({}, "dual: one forward"),
        ({"groups": "batch"}, "lowrank: it gives rows"),
        ({"engine": "sequential"}, "sequential: as asked for"),
        ({"sparsity": 0.5}, "sequential: what the method and its enhancements are served by"),
    ]
    for options, said in chosen:
        optimizer = ZeroOrderOptimizer(model, **options)
        assert optimizer.chosen_engine.startswith(said)
        assert not optimizer.engine.writer.holds


def test_auto_takes_long_batches_by_separate_forwards_on_a_cpu(monkeypatch):
    model, calls = torch.nn.Linear(8, 4), []
    monkeypatch.setattr(dual, "WORTH_ON_CPU", 24)

    def loss(batch):
        calls.append(len(batch["x"]))
        return model(batch["x"]).square().mean(1)

    ours, named = (ZeroOrderOptimizer(model, lr=0.0, engine=e) for e in ("auto", "dual"))
    for optimizer in (ours, named):
        optimizer.step(loss, batch={"x": torch.ones(3, 8)})  # the first batch is checked
    for optimizer, rows, wanted in ((ours, 3, [6]), (ours, 4, [4, 4]), (named, 4, [8])):
        calls.clear()
        optimizer.step(loss, batch={"x": torch.ones(rows, 8)})
        assert calls == wanted
        assert optimizer.engine.usable


def test_an_engine_that_stepped_aside_says_so_and_why():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Dropout(0.5))
    optimizer = ZeroOrderOptimizer(model, lr=0.0)
    assert optimizer.chosen_engine.startswith("dual: one forward")
    optimizer.step(lambda batch: model(batch["x"]).square().mean(1), batch={"x": torch.ones(3, 8)})
    assert optimizer.chosen_engine.startswith("dual: by separate forwards, since the loss draws from torch's generator")
