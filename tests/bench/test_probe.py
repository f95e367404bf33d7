"""A probe: what it steps by is what it was asked for, or refused."""

from __future__ import annotations

import pytest
import torch

from zotune.bench.probe import measure
from zotune.bench.suite import expand, load_suite
from zotune.errors import InputError
from zotune.estimates.meta import build, model_config

TINY = {"random": {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}}  # fmt: skip
SHAPE = {"model": TINY, "tokens": 8, "batch_size": 2, "dtype": "bfloat16", "device": "cpu", "steps": 2}


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"method": "zo-sgd"}, 4),
        ({"method": "zo-sgd", "estimator": "one-sided", "queries": 3}, 8),
        ({"method": "zo-sgd", "hybrid": 0.5, "fo_lr": 1e-4}, 6),
        ({"method": "zo-sgd", "blocks": "transformer"}, 4 * 5),
        ({"method": "forward-grad", "queries": 2, "sparsity": 0.5, "mask": "magnitude"}, 4),
        ({"method": "zo-sgd", "groups": "batch", "rank": 2}, 4),
        ({"method": "fo-adam", "scheme": "lora", "checkpointing": True, "state_dtype": "parameter"}, 2),
    ],
)
def test_a_probe_steps_by_what_it_was_asked_for(options, passes):
    assert measure(SHAPE | options)["forward_passes"] == passes


@pytest.mark.parametrize("tied", [True, False])
def test_a_probe_has_the_parameters_of_its_config(tied):
    definition = TINY["random"] | {"tie_word_embeddings": tied}
    whole = build(model_config({"random": definition}), torch.bfloat16)
    measured = measure(SHAPE | {"model": {"random": definition}, "method": "zo-sgd"})
    assert measured["trainable_parameters"] == sum(p.numel() for p in whole.parameters())


def test_the_optimizer_has_the_options_of_the_probe(monkeypatch):
    from zotune.step import optimizer

    seen, real = {}, optimizer.ZeroOrderOptimizer

    def made(model, method, **given):
        seen.update(given)
        return real(model, method, **given)

    monkeypatch.setattr(optimizer, "ZeroOrderOptimizer", made)
    wanted = {"state_dtype": "bfloat16", "direction": "rademacher", "rounding": "compensated", "sparsity": 0.5,
              "mask_refresh": 3, "seed": 7}  # fmt: skip
    measure(SHAPE | {"method": "zo-adam"} | wanted)
    assert seen.items() >= wanted.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, "--lr: a probe"),
        ({"task": "sst2"}, "--task: a probe"),
        ({"checkpointing": True}, "--checkpointing: method 'zo-sgd' keeps no activations"),
        ({"state_dtype": "bfloat16"}, "no option 'state_dtype'"),
        ({"blocks": "linear", "hybrid": 0.5, "fo_lr": 1}, "choose one"),
        ({"tokens": 8, "bach_size": 2}, "did you mean 'batch_size'?"),
    ],
)
def test_what_a_probe_cannot_measure_is_refused(suite_file, changes, message):
    grid = {"model": "tiny", "method": "zo-sgd", "scheme": "full", "seed": 0}
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        expand(load_suite(suite_file(kind="probe", grid=grid, defaults=changes, budget={"steps": 2})))
