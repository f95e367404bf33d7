"""A direction for each row about one draw (grzo): what a step is, on whole tensors; records, short batches, captured steps."""

from __future__ import annotations

import copy

import pytest
import torch
from families import CAUSAL, build
from test_graphs import pretend
from test_own_inputs import batch_of, row_of

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import signed
from zotune.errors import OptionError
from zotune.noise import reference
from zotune.record.trajectory import Record
from zotune.tasks.scoring import answer_logits

LR, EPS, SEED = 1e-3, 1e-2, 5


def losses_of(model, batch) -> torch.Tensor:
    """A row's mean over its answer's tokens, in float64: a spread of differences of float32's losses has few digits."""
    nll = -answer_logits(model, batch).double().log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    return (nll * batch["target_mask"]).sum(1) / batch["target_mask"].sum(1)


def loss_at(model, batch, move: dict[str, torch.Tensor], by: float) -> float:
    moved = copy.deepcopy(model)
    own = dict(moved.named_parameters())
    with torch.no_grad():
        for name, z in move.items():
            own[name].add_(by * z)
        return float(losses_of(moved, batch))


def z_of(model, step: int, row: int) -> dict[str, torch.Tensor]:
    """U∘(r·sᵀ) of each parameter, a vector as a matrix of one column."""
    base, own = (signed(noise.step_seed(SEED, step, 0, k)) for k in (0, row))
    found = {}
    for name, p in model.named_parameters():
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        u = reference.normals(torch.arange(p.numel()), base, noise.parameter_id(name)).double()
        r = reference.signs(torch.arange(rows), own, noise.parameter_id(f"{name}.U")).double()
        s = reference.signs(torch.arange(columns), own, noise.parameter_id(f"{name}.V")).double()
        found[name] = (u.view(rows, columns) * r[:, None] * s).view(p.shape)
    return found


def step_by_hand(model, batch, step: int) -> None:
    rows = len(batch["input_ids"])
    zs = [z_of(model, step, i) for i in range(rows)]
    delta = [
        loss_at(model, row_of(batch, i), z, EPS) - loss_at(model, row_of(batch, i), z, -EPS) for i, z in enumerate(zs)
    ]
    spread = torch.tensor(delta).double().std(correction=0)
    a = [float(d / (spread + 1e-8)) if rows > 1 else 0.0 for d in delta]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= LR * sum(x * z[name] for x, z in zip(a, zs, strict=True)) / (2 * EPS * rows)


def optimizer_of(model, **more) -> ZeroOrderOptimizer:
    return ZeroOrderOptimizer(model, "grzo", **{"lr": LR, "eps": EPS, "seed": SEED} | more)


@pytest.mark.parametrize("forward_tokens", [None, 30])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_step_is_its_formula_and_a_short_batchs_is_of_its_own_rows(name, forward_tokens):
    model = build(name).double()
    hand = copy.deepcopy(model)
    optimizer = optimizer_of(model, forward_tokens=forward_tokens)
    for step, rows in enumerate((4, 3, 1)):
        batch = batch_of(rows, seed=step)
        optimizer.step(lambda batch: losses_of(model, batch), batch=batch)
        step_by_hand(hand, batch, step)
    assert optimizer.engine.usable, optimizer.engine.why
    assert optimizer.last.told_nothing  # one row has no spread
    assert optimizer.skipped_steps == 0
    begun = build(name).double()
    for (n, p), q, start in zip(model.named_parameters(), hand.parameters(), begun.parameters(), strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=0, atol=1e-6)  # g, lr and U are float32
        assert (p - start).abs().max() > 1e-3, n
    assert optimizer.forward_passes == 3 * 2


@pytest.mark.parametrize("name", list(CAUSAL))
def test_losses_are_those_of_perturbed_copies(name):
    model, batch = build(name).double(), batch_of()
    optimizer = optimizer_of(model, lr=0.0)
    optimizer.step(lambda batch: losses_of(model, batch), batch=batch)
    assert optimizer.engine.usable, optimizer.engine.why
    wanted = [loss_at(model, row_of(batch, i), z_of(model, 0, i), sign * EPS) for sign in (1, -1) for i in range(4)]
    torch.testing.assert_close(torch.tensor(optimizer.last.losses_P), torch.tensor(wanted), rtol=2e-6, atol=0)


def test_the_directions_of_two_rows_are_uncorrelated_and_as_long_as_a_normal_draw():
    model = build("llama").double()
    one, two = (torch.cat([z.flatten() for z in z_of(model, 0, k).values()]) for k in (0, 1))
    assert abs(float(one @ two / one.norm() / two.norm())) < 4 / len(one) ** 0.5
    assert float(one.square().mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_record_gives_the_weights_again(dtype):
    model, again, records = build("llama").to(dtype), build("llama").to(dtype), []
    optimizer = optimizer_of(model)
    for step, rows in enumerate((4, 4, 2)):
        optimizer.step(lambda batch: losses_of(model, batch), batch=batch_of(rows, seed=step))
        taken = optimizer.last
        g, lr = (tuple(torch.tensor(x).float().tolist()) for x in (taken.g_GQ[0], taken.lr_G))
        records.append(Record(step, 0.0, 0.0, g, lr, (0.0,)))
    other = optimizer_of(again, lr=0.0)
    other.apply_records(records)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(next(model.parameters()), next(build("llama").to(dtype).parameters()))


def test_a_captured_step_gives_the_weights_of_one_without(monkeypatch):
    """On the CPU: what a graph would hold, run as plain functions."""
    ends = []
    for wanted in (False, True):
        if wanted:
            pretend(monkeypatch)
        model = build("llama")
        optimizer = optimizer_of(model)
        optimizer.captured.wanted = wanted
        loss = lambda batch, model=model: losses_of(model, batch) * batch["factor"]  # noqa: E731
        for step in range(4):
            factor = torch.tensor(float("nan") if step == 2 else 1.0).expand(4).clone()
            optimizer.step(loss, batch=batch_of(seed=step) | {"factor": factor})
        optimizer.land()
        assert optimizer.skipped_steps == 1
        assert (optimizer.captured.graphs is not None) == wanted
        ends.append(model)
    for p, q in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"engine": "dual"}, "engine"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"fold_every": 2}, "fold_every"),
        ({"rank": 2}, "rank"),
        ({"groups": 1}, "groups"),
        ({"rounding": "compensated"}, "rounding"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_its_name(given, option):
    with pytest.raises(OptionError) as error:
        ZeroOrderOptimizer(build("llama"), "grzo", **given)
    assert error.value.option == option
