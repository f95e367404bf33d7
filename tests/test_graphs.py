"""A captured step does what the host would. Needs a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from zotune import ZeroOrderOptimizer

pytestmark = pytest.mark.gpu

CONFIG = tf.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@pytest.mark.parametrize("engine", ["sequential", "dual", "lowrank", "batch"])
def test_captured_steps_give_the_weights_of_steps_without(dtype, direction, engine):
    torch.manual_seed(0)
    plain = tf.LlamaForCausalLM(CONFIG).to("cuda", dtype).eval()
    captured = copy.deepcopy(plain)
    batches = [{"input_ids": torch.randint(0, 64, (4, 8 + 8 * (i % 2)), device="cuda")} for i in range(8)]

    def loss_of(model):
        def rows(batch):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            return losses.mean(1)

        return rows

    chosen = {"groups": "batch"} if engine == "batch" else {"engine": engine}
    first, second = (ZeroOrderOptimizer(m, lr=1e-3, direction=direction, seed=1, **chosen) for m in (plain, captured))
    first._captured_step = lambda *args: None
    f, g = loss_of(plain), loss_of(captured)
    for batch in batches:
        first.step(f, batch=batch)
        second.step(g, batch=batch)
    first.flush()
    second.flush()
    assert getattr(second.engine, "usable", True)
    assert second._graphs is not None
    assert second._graphs.usable
    assert len(second._graphs._graphs) == 2
    assert first.forward_passes == second.forward_passes == 16
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"fold_every": 4},
        {"fold_every": 4, "groups": "batch"},
        {"fold_every": 8, "groups": "batch", "rank": 4},
        {"rounding": "compensated"},
        {"rounding": "compensated", "fold_every": 2, "engine": "dual"},
    ],
)
def test_captured_folds_give_the_weights_of_folds_without(dtype, options):
    torch.manual_seed(0)
    plain = tf.LlamaForCausalLM(CONFIG).to("cuda", dtype).eval()
    captured = copy.deepcopy(plain)
    batch = {"input_ids": torch.randint(0, 64, (4, 8), device="cuda")}

    def loss_of(model):
        def rows(batch):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            return losses.mean(1)

        return rows

    before = copy.deepcopy(plain.state_dict())
    first, second = (ZeroOrderOptimizer(m, lr=1e-3, seed=1, **options) for m in (plain, captured))
    first._captured_step = lambda *args: None
    f, g = loss_of(plain), loss_of(captured)
    for _ in range(8):
        first.step(f, batch=batch)
        second.step(g, batch=batch)
    assert second._graphs.usable
    assert second.state_bytes == first.state_bytes
    assert not torch.equal(before["lm_head.weight"], captured.state_dict()["lm_head.weight"])
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_loss_that_draws_dropout_is_not_captured_and_still_steps():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).cuda().train()
    optimizer = ZeroOrderOptimizer(model, lr=1e-3)
    batch = {"x": torch.randn(4, 8, device="cuda")}
    for _ in range(2):
        optimizer.step(lambda batch: model(batch["x"]).square().mean(), batch=batch)
    assert not optimizer._graphs.usable
    assert optimizer.steps == 2
