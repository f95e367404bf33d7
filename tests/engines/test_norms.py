"""Which modules are taken for an RMS norm, and that they compute what they did."""

from __future__ import annotations

import families
import pytest
import torch
from torch import nn

from zotune.engines import parts
from zotune.engines.modules import FusedModules
from zotune.engines.norms import RmsNorm, recognised
from zotune.step.optimizer import ZeroOrderOptimizer

RMS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"}


class Squared(nn.Module):
    """Has all that an RMS norm has, and is none."""

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.weight, self.eps, self.power = nn.Parameter(torch.ones(8)), 1e-6, power

    def forward(self, x):
        return self.weight * x / (x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps) ** (1 / self.power)


def test_a_trial_is_not_seen_by_hooks_and_changes_nothing():
    seen, module = [], Gated()
    module.register_forward_hook(lambda *args: seen.append(args))
    before = module.weight.detach().clone()
    assert recognised(module) is not None
    assert not seen
    assert torch.equal(module.weight, before)


def test_a_module_is_known_by_what_it_computes():
    assert recognised(Squared(2.0)) is not None
    assert recognised(Squared(3.0)) is None
    assert recognised(nn.LayerNorm(8)) is None
    shifted = Squared()
    shifted.eps = 2e-6  # what it says is what it does
    assert recognised(shifted).eps == 2e-6
    shifted.forward = lambda x: x  # somebody else has taken its place
    assert recognised(shifted) is None


@pytest.mark.parametrize("family", [f for f in families.CAUSAL if f in RMS])
def test_the_norms_of_a_family_are_found_in_a_forward(family):
    model = families.build(family)
    norms = FusedModules(list(model.parameters()))
    with norms.learning(), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    wanted = [m for name, m in model.named_modules() if "norm" in name.lower() and type(m).__module__ != "torch.nn"]
    found = {module: known for module, known in norms._found.items() if isinstance(known, RmsNorm)}
    assert set(found) == set(wanted) != set()
    assert {known.offset for known in found.values()} == {1.0 if "gemma" in family else 0.0}


@pytest.mark.parametrize(
    "engine", [{"engine": "dual"}, {"engine": "lowrank"}, {"engine": "lowrank", "groups": "batch"}]
)
@pytest.mark.parametrize("family", ["qwen3", "opt", "gpt2", "gemma"])
def test_kernels_give_the_losses_that_torch_gives(family, engine, monkeypatch):
    """The engines' whole forward by kernels, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], device=device)
    found = []
    for kernels in (set(), {device}):
        monkeypatch.setattr(parts, "KERNEL_DEVICES", kernels)
        model = families.build(family).to(device)

        def rows(batch, model=model):
            logits = model(input_ids=batch["ids"]).logits[:, -1].float()
            return -logits.log_softmax(-1)[:, 7]

        optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, **engine)
        for _ in range(2):  # the second has learned which weights take one x, and which modules are norms
            optimizer.step(rows, batch={"ids": ids})
            assert optimizer.engine.usable, optimizer.engine.why
        found.append(torch.tensor(optimizer.last.losses_P))
        assert "forward" not in next(m for n, m in model.named_modules() if "norm" in n or "ln" in n).__dict__
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=2e-5)


class Gated(nn.Module):
    """An RMS norm, unless it is given a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8) + 0.5), 1e-6

    def forward(self, x, gate=None):
        x = x if gate is None else x * gate
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def by_kernels_and_without(monkeypatch, make, rows, **engine):
    """The losses of a step after one that has learned, by kernels and by torch."""
    pytest.importorskip("triton")
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for kernels in (set(), {device}):
        monkeypatch.setattr(parts, "KERNEL_DEVICES", kernels)
        torch.manual_seed(0)
        model = make().to(device)
        x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).to(device)
        optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, **engine)
        for _ in range(2):
            optimizer.step(lambda batch, model=model: rows(model, batch["x"]), batch={"x": x})
            assert optimizer.engine.usable, optimizer.engine.why
        found.append(torch.tensor(optimizer.last.losses_P))
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("engine", [{"engine": "dual"}, {"engine": "lowrank"}])
def test_a_norm_that_is_given_a_gate_computes_as_it_is_written(monkeypatch, engine):
    make = lambda: nn.ModuleList([nn.Linear(8, 8), Gated()])  # noqa: E731

    def rows(model, x):
        h = model[0](x)
        return (model[1](h, gate=h.sigmoid()) + model[1](h, None) + model[1](h)).square().mean((1, 2))

    by_kernels_and_without(monkeypatch, make, rows, **engine)


def test_a_forward_that_somebody_puts_on_a_norm_stays_there():
    model = nn.ModuleList([nn.Linear(8, 8), Gated()])
    norms = FusedModules(list(model.parameters()))
    with norms.learning(), torch.no_grad():
        model[1](torch.ones(2, 8))
    assert norms
    model[1].forward = own = lambda x: x
    with norms.standing_in(None):
        assert model[1].forward is own
    assert model[1].forward is own


@pytest.mark.parametrize("engine", [{"engine": "lowrank"}, {"engine": "lowrank", "groups": "batch"}])
def test_transposed_hidden_states_and_ones_changed_in_place_give_the_losses_that_torch_gives(monkeypatch, engine):
    make = lambda: nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5)])  # noqa: E731

    def rows(model, x):
        h = model[0](x.transpose(1, 2))
        first = model[1](h)
        h.mul_(0.5)
        return (first * model[2](h)).mean((1, 2))

    by_kernels_and_without(monkeypatch, make, rows, **engine)
