"""Captured steps of the dual engine that hold their update back. Needs a CUDA device."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from torch import nn

from zotune import ZeroOrderOptimizer
from zotune.directions import Displacement
from zotune.engines import dual as dual_engine
from zotune.record.trajectory import Record

pytestmark = pytest.mark.gpu


class Rows:
    """A loss a row, or NaN."""

    def __init__(self, model, factor=1.0):
        self.model, self.factor = model, factor

    def __call__(self, batch):
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        return losses.mean(1) * self.factor


def opt(dtype, hidden=128) -> nn.Module:
    """Biases, a tied head, positions; matrices that are not among the small parameters."""
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=2048, hidden_size=hidden, ffn_dim=6 * hidden, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=hidden, max_position_embeddings=64,
    )  # fmt: skip
    return tf.OPTForCausalLM(config).to("cuda", dtype).eval()


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_captured_steps_that_hold_updates_back_give_the_bits_of_steps_that_do_not(
    monkeypatch, direction, dtype, queries
):
    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 4096)
    monkeypatch.setattr(dual_engine, "TILE_BYTES", 1 << 16)
    models = [opt(dtype) for _ in range(2)]
    chosen = {"lr": 1e-3, "direction": direction, "queries": queries, "seed": 1, "engine": "dual"}
    holds, direct = optimizers = [ZeroOrderOptimizer(m, **chosen) for m in models]
    direct.engine.writer.may = False
    losses, spoiled = ([Rows(m, factor) for m in models] for factor in (1.0, float("nan")))
    draw = torch.Generator().manual_seed(0)
    for step in range(16):
        batch = {"input_ids": torch.randint(0, 2048, (4, 8 + 8 * (step % 3)), generator=draw).cuda()}
        batches = [batch, batch] if step in (5, 11) else batch
        for loss, optimizer in zip(spoiled if step in (4, 9) else losses, optimizers, strict=True):
            optimizer.step(loss, batch=batches)
            optimizer.land()
        assert holds.last.losses_P == direct.last.losses_P or step in (4, 9)
        if step in (2, 7, 10):
            holds.settle()
            assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert holds.engine.writer.holds
    assert holds.captured.graphs.usable
    assert len(holds.captured.graphs) == 6
    assert holds.skipped_steps == direct.skipped_steps == 2
    assert not all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    holds.flush()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    rebuilt = opt(dtype)
    assert not torch.equal(rebuilt.lm_head.weight, models[0].lm_head.weight)


def test_a_replay_gives_the_bits_of_captured_steps_that_hold_updates_back(monkeypatch):
    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 4096)
    model, rebuilt = opt(torch.bfloat16), opt(torch.bfloat16)
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, seed=1, engine="dual")
    again = ZeroOrderOptimizer(rebuilt, lr=0.0, seed=1, engine="sequential")
    loss = Rows(model)
    for _ in range(5):
        optimizer.step(loss, batch={"input_ids": torch.randint(0, 2048, (4, 16), device="cuda")})
        optimizer.land()
        last = optimizer.last
        again.apply_record(Record(last.step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped))
    optimizer.flush()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_within_the_product_is_the_bias_after_it(monkeypatch, dtype):
    """Whole copies where tiles would do, and products of one half each."""
    monkeypatch.setattr(dual_engine, "SMALL_BYTES", 4096)
    monkeypatch.setattr(dual_engine, "TILE_BYTES", 1 << 16)
    monkeypatch.setattr(dual_engine, "FILLS_GPU", 1)
    model = opt(dtype)
    at, batch = Displacement((5,), ((1e-2,),)), {"input_ids": torch.randint(0, 2048, (16, 64), device="cuda")}
    found = []
    for within in (True, False):
        monkeypatch.setattr(dual_engine, "BIAS_IN_PRODUCT", within)
        engine = ZeroOrderOptimizer(model, engine="dual").engine
        found.append(families.both(engine, Rows(model), batch, at))
        assert engine.usable
    torch.testing.assert_close(*found, rtol=8 * torch.finfo(dtype).eps, atol=0)
