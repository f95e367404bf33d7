"""What torch.compile has made of a model or a loss is stepped as it was written, to the same bits."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from zotune import ZeroOrderOptimizer

STEPS = 2


def batch():
    ids = torch.randint(0, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def compiled(how: str, backend: str = "eager"):
    """What is given to the optimizer, and the loss."""
    model = tiny.causal_model()
    forward = model
    if how == "in place":
        model.compile(backend=backend)
    elif how == "scripted":
        model = forward = nn.Sequential(nn.Embedding(tiny.VOCABULARY, 8), nn.Linear(8, tiny.VOCABULARY))
        with torch.no_grad():
            for param, start in zip(model.parameters(), (1, 2, 3), strict=True):
                param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(start)))
        forward = torch.jit.script(model)
        rows = batch()["labels"]
        return model, lambda: nn.functional.cross_entropy(forward(rows).flatten(0, 1), rows.flatten())
    elif how != "plain":
        forward = torch.compile(model, backend=backend)
    if how == "called before":
        forward(**batch())
    given = forward if how in ("module", "called before") else model
    loss = lambda: forward(**batch()).loss  # noqa: E731
    return given, torch.compile(loss, backend=backend) if how == "closure" else loss


def after(how: str, **options):
    given, loss = compiled(how)
    optimizer = ZeroOrderOptimizer(given, lr=1e-2, seed=3, **options)
    return [float(optimizer.step(loss)) for _ in range(STEPS)], [p.detach().clone() for p in given.parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"method": "forward-grad"}, {"engine": "sequential", "queries": 2}, {"method": "fo-sgd"}], ids=str
)
@pytest.mark.parametrize("how", ["module", "called before", "in place", "closure", "parameters"])
def test_a_compiled_model_is_stepped_to_the_same_bits(how, options):
    """By the names of its own parameters too: those of the compiled module begin with _orig_mod, and would draw other noise."""
    torch._dynamo.reset()
    wanted, found = after("plain", **options), after(how, **options)
    assert wanted[0] == found[0]
    assert all(map(torch.equal, wanted[1], found[1]))


def test_a_scripted_model_that_reads_its_parameters_unseen_is_stepped_right():
    """A script's reads are no torch functions: whole copies stand in for its parameters."""
    model, loss = compiled("scripted")
    rows = batch()["labels"]
    plain = lambda: nn.functional.cross_entropy(model(rows).flatten(0, 1), rows.flatten())  # noqa: E731
    found = []
    for closure in (loss, plain):
        optimizer = ZeroOrderOptimizer(model, lr=0.0, seed=3)
        optimizer.step(closure)
        found.append(optimizer.last.losses_P)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][0] != found[0][1]
