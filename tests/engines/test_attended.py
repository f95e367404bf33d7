"""Torch's fused attention on a CPU gives 0 for a query that is no number; here no figure is made of that."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from zotune import ZeroOrderOptimizer, ZOTrainer, ZOTrainingArguments
from zotune.engines.attended import attended, hiding_nothing
from zotune.errors import NotFinite
from zotune.tasks import Task
from zotune.tasks.encoding import Encoded
from zotune.tasks.evaluation import outcome

QKV = [torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_that_is_no_number_gives_none(bad, causal):
    query, key, value = (tensor.clone() for tensor in QKV)
    query[1, 2, 3] = bad
    hidden = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    found = attended(F.scaled_dot_product_attention, (query, key, value), {"is_causal": causal})
    assert hidden.isfinite().all()  # what torch says of it
    assert not found[1, 2, 3].isfinite().any()
    found[1, 2, 3] = hidden[1, 2, 3]
    assert torch.equal(found, hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_queries_keep_their_bits(dtype):
    query, key, value = (tensor.to(dtype) for tensor in QKV)
    for largest in (1.0, torch.finfo(dtype).max / 8 if dtype == torch.float16 else 1e3):
        wide = query * largest
        found = attended(F.scaled_dot_product_attention, (wide, key, value), {})
        assert torch.equal(found, F.scaled_dot_product_attention(wide, key, value))
        named = attended(F.scaled_dot_product_attention, (), {"query": wide, "key": key, "value": value})
        assert torch.equal(named, found)


@torch.no_grad()
def out_of_range() -> nn.Module:
    """A model whose queries overflow in float16, and nothing else does: its logits are finite, and wrong."""
    model = tiny.causal_model().half()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.copy_((weight.float() * 3e6).clamp(-65000, 65000))
    for param in model.parameters():
        assert param.isfinite().all()
    return model


def test_no_answer_is_scored_from_attention_that_overflows():
    model, rows = out_of_range(), [Encoded((5, 6, 7, 8), ((9,), (10,)), 0)] * 3
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert model(input_ids=ids).logits.isfinite().all()  # which is what is hidden
    task = Task(name="t", prompt="{text}", words={"0": "bad", "1": "good"})
    with pytest.raises(NotFinite, match=r"^3 of 3 rows: scores are not finite in float16; it overflows there"):
        outcome(model, tiny.tokenizer(), task, rows, batch_size=2, pad_id=0)


@pytest.mark.parametrize(
    "options", [{}, {"engine": "sequential"}, {"engine": "dual"}, {"groups": "batch"}, {"method": "fo-sgd"}], ids=str
)
def test_no_step_is_taken_by_losses_that_hide_an_overflow(options):
    model = out_of_range()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, **options)
    ids = torch.randint(0, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))

    def losses(batch):
        logits = model(input_ids=batch["ids"]).logits[:, :-1].float()
        return F.cross_entropy(logits.mT, batch["ids"][:, 1:], reduction="none").mean(1)

    optimizer.step(losses, batch={"ids": ids})
    optimizer.flush()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, model.parameters()))


def test_a_trainer_s_metric_is_not_asked_either(tmp_path):
    args = ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 3
    told = ZOTrainer(out_of_range(), args, eval_dataset=rows, compute_metrics=lambda found: {"share": 1.0})
    with pytest.raises(NotFinite, match="3 of 3 rows: outputs are not finite in float16"):
        told.evaluate()


def test_nothing_is_watched_where_no_parameter_is_on_a_cpu():
    assert not isinstance(hiding_nothing([torch.empty(1, device="meta")]), torch.overrides.TorchFunctionMode)
