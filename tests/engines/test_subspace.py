"""Directions in a subspace on real architectures: losses at their places, updates, dtypes, resumed, replayed and captured steps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import CAUSAL, build
from test_graphs import pretend
from test_own_inputs import batch_of

from zotune import Method, ZeroOrderOptimizer, noise
from zotune.directions import signed
from zotune.directions.subspaces import Subspace, drawn, principal
from zotune.errors import OptionError
from zotune.estimators import LeaveOneOut, OneSided
from zotune.methods import make_method
from zotune.noise import reference
from zotune.record.trajectory import Record
from zotune.tasks.scoring import answer_losses
from zotune.updates import Adam, Average, Sgd
from zotune.updates.cores import msign

SEED, EPS = 5, 1e-2
KINDS = {
    "right": Subspace(right="normal", every=2, step=None),
    "left": Subspace(left="orthonormal", every=2),
    "both": Subspace(left="orthonormal", right="orthonormal"),
}


def method_of(kind: str, rule=None) -> Method:
    return Method(OneSided(3), rule or Average(), subspace=KINDS[kind], rank=4, lr=1e-2, eps=EPS)


def optimizer_of(model, kind: str, rule=None, **more) -> ZeroOrderOptimizer:
    return ZeroOrderOptimizer(model, method_of(kind, rule), **{"seed": SEED} | more)


def whole_z(optimizer: ZeroOrderOptimizer, step: int, query: int) -> dict[str, torch.Tensor]:
    """z of each parameter as a whole tensor, from the bases that the engine has and draws of the reference."""
    found, factored = {}, optimizer.engine.factored
    for param in optimizer.param_groups[0]["params"]:
        name, seed = optimizer.engine.directions.slots[id(param)].name, signed(noise.step_seed(SEED, step, query))

        def draw(name, count, seed=seed):
            return reference.normals(torch.arange(count), seed, noise.parameter_id(name)).double()

        left, right = factored.bases.get(id(param), (None, None))
        if left is None and right is None:
            found[name] = draw(name, param.numel()).view(param.shape)
            continue
        rows, columns = param.shape
        if right is None:
            found[name] = left.double() @ draw(f"{name}.V", columns * 4).view(-1, 4).T
        else:
            core = draw(f"{name}.U", 4 * (rows if left is None else 4)).view(-1, 4)
            found[name] = (core if left is None else left.double() @ core) @ right.double().T
    return found


def loss_at(model, batch, z, by: float) -> torch.Tensor:
    moved = copy.deepcopy(model)
    own = dict(moved.named_parameters())
    with torch.no_grad():
        for name, value in z.items():
            own[name].add_(by * value)
        return answer_losses(moved, batch)


@pytest.mark.parametrize("forward_tokens", [None, 30])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(CAUSAL))
def test_losses_are_those_of_perturbed_copies_however_places_share_forwards(name, kind, forward_tokens):
    model, batch = build(name).double(), batch_of()
    optimizer = optimizer_of(model, kind, lr=0.0, forward_tokens=forward_tokens)
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
    assert optimizer.engine.usable, optimizer.engine.why
    wanted = [answer_losses(model, batch).mean()]
    wanted += [loss_at(model, batch, whole_z(optimizer, 0, q), EPS).mean() for q in range(3)]
    wanted = torch.stack(wanted).detach()
    torch.testing.assert_close(torch.tensor(optimizer.last.losses_P), wanted, rtol=2e-7, atol=0)
    assert (wanted - wanted[0]).abs()[1:].max() > 1e-3
    inside = {optimizer.engine.directions.slots[key].name for key in optimizer.engine.factored.bases}
    assert inside == {n for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_may_have_directions_of_their_own(kind):
    model, batch = build("llama").double(), batch_of()
    method = replace(method_of(kind, Sgd()), estimator=LeaveOneOut(2), groups="batch")
    optimizer = ZeroOrderOptimizer(model, method, lr=0.0, seed=SEED)
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
    assert optimizer.engine.usable, optimizer.engine.why
    losses = torch.tensor(optimizer.last.losses_P).view(2, 4)
    for i in range(4):
        z = whole_z(optimizer, 0, 1)
        seed = noise.step_seed(SEED, 0, 1, i)
        assert optimizer.last.seeds_Q[4 + i] == seed
        z = whole_z_of(optimizer, seed)
        torch.testing.assert_close(losses[1, i], loss_at(model, batch, z, EPS)[i].detach(), rtol=2e-7, atol=0)


def whole_z_of(optimizer: ZeroOrderOptimizer, seed: int) -> dict[str, torch.Tensor]:
    before = noise.step_seed
    try:
        noise.step_seed = lambda *_: seed
        return whole_z(optimizer, 0, 0)
    finally:
        noise.step_seed = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_narrow_weights_follow_float64(kind, dtype):
    """A step's update, within the rounding of the weights and of their bases."""
    narrow = build("llama").to(dtype)
    exact = copy.deepcopy(narrow).double()
    before = copy.deepcopy(exact)
    batch = batch_of()
    first, second = (optimizer_of(m, kind, Sgd(), lr=1.0) for m in (narrow, exact))
    for optimizer, model in ((first, narrow), (second, exact)):
        optimizer.step(lambda batch, model=model: answer_losses(model, batch), batch=batch)
    assert not first.last.skipped
    g = torch.tensor([second.last.g_GQ[0], first.last.g_GQ[0]])
    # the same losses in both, so that the update alone is compared
    record = Record(0, 0.0, 0.0, tuple(g[0].tolist()), (1e-2,), (0.0,))
    for model, start in ((narrow, before.to(dtype)), (exact, before.double())):
        model.load_state_dict(start.state_dict())
        optimizer_of(model, kind, Sgd()).apply_record(record)
    begun = dict(build("llama").to(dtype).double().named_parameters())
    for (name, p), q in zip(narrow.named_parameters(), exact.parameters(), strict=True):
        moved = (q - begun[name]).abs().max()
        assert moved > 1e-4
        bound = torch.finfo(dtype).eps * (q.abs().max() + 8 * moved) + 1e-6
        assert (p.double() - q).abs().max() < bound


@pytest.mark.parametrize("name", ["lozo-m", "zo-muon", "subzero-plus"])
def test_a_record_gives_the_weights_again_and_a_cut_run_is_a_whole_one(name):
    method = make_method(name, queries=2)
    method = replace(method, subspace=replace(method.subspace, every=method.subspace.every and 2), rank=4)
    ends, records = [], []
    for cut in (False, True):
        model = build("llama").to(torch.bfloat16)
        optimizer = ZeroOrderOptimizer(model, method, lr=1e-2, eps=EPS, seed=SEED, weight_decay=0.1)
        for step in range(6):
            if cut and step in (2, 5):  # where the subspace is drawn anew, and where it is not
                kept = copy.deepcopy(optimizer.state_dict())
                optimizer = ZeroOrderOptimizer(model, method, lr=1e-2, eps=EPS, seed=SEED, weight_decay=0.1)
                optimizer.load_state_dict(kept)
            if step == 3:  # not a number: nothing moves, and the subspace turns all the same
                optimizer.step(lambda model=model: answer_losses(model, batch_of()).mean() * float("nan"))
            else:
                optimizer.step(lambda batch, model=model: answer_losses(model, batch), batch=batch_of(seed=step))
            taken = optimizer.last
            if not cut:
                g = tuple(torch.tensor(taken.g_GQ[0]).float().tolist())
                lr = tuple(torch.tensor(taken.lr_G).float().tolist())
                records.append(Record(step, 0.0, 0.0, g, lr, taken.decay_G, taken.skipped))
        ends.append(model)
    again = build("llama").to(torch.bfloat16)
    optimizer = ZeroOrderOptimizer(again, method, lr=0.0, seed=SEED)
    optimizer.apply_records(records)
    for whole, cut, replayed in zip(*(m.parameters() for m in (*ends, again)), strict=True):
        assert torch.equal(whole, cut)
        assert torch.equal(whole, replayed)
    assert not torch.equal(next(again.parameters()), next(build("llama").to(torch.bfloat16).parameters()))


@pytest.mark.parametrize("rule", [Average(), Adam(), Sgd(), make_method("zo-muon").rule], ids=repr)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_captured_step_gives_the_weights_of_one_without(kind, rule, monkeypatch):
    """On the CPU: what a graph would hold, run as plain functions; a step that is not finite leaves weights and state."""
    ends, states = [], []
    for wanted in (False, True):
        if wanted:
            pretend(monkeypatch)
        model = build("llama")
        optimizer = optimizer_of(model, kind, rule, weight_decay=0.1)
        optimizer.captured.wanted = wanted
        loss = lambda batch, model=model: answer_losses(model, batch) * batch["factor"]  # noqa: E731
        for step in range(5):
            factor = torch.tensor(float("inf") if step == 3 else 1.0).expand(4).clone()
            optimizer.step(loss, batch=batch_of(seed=step) | {"factor": factor})
        optimizer.land()
        assert optimizer.skipped_steps == 1
        assert (optimizer.captured.graphs is not None) == wanted
        ends.append(model)
        states.append([v for own in optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor)])
    for p, q in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    for p, q in zip(*states, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    assert not all(torch.equal(p, q) for p, q in zip(build("llama").parameters(), ends[0].parameters(), strict=True))


def test_state_is_as_large_as_the_cores():
    model = build("llama")
    optimizer = optimizer_of(model, "both", Adam())
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch_of())
    small = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    matrices = sum(p.dim() > 1 for p in model.parameters())
    assert optimizer.state_bytes == 4 * 2 * (16 * matrices + small)


@pytest.mark.parametrize(("side", "rank"), [(5, 3), (129, 64), (7, 7)])
def test_bases_are_orthonormal_and_follow_from_the_seed_and_the_turn(side, rank):
    one, same, other = (drawn("orthonormal", side, rank, 3, turn, 11, torch.device("cpu")) for turn in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one.T @ one, torch.eye(rank), rtol=0, atol=1e-6)
    normal = drawn("normal", side, rank, 3, 1, 11, torch.device("cpu"))
    r = one.T @ normal  # with its diagonal positive this is the QR of the normal matrix, whatever the library
    assert (r.diagonal() > 0).all()
    torch.testing.assert_close(r.tril(-1), torch.zeros(rank, rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(one @ r, normal, rtol=0, atol=1e-5)


def test_principal_directions_of_few_rows_end_in_zeros():
    rows = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0]])
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(principal(rows, 3), wanted)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (64, 129), (1, 7)])
def test_msign_keeps_the_singular_vectors_and_brings_all_singular_values_near_1(shape):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1.0, 0.2, min(shape)).double()
    found = msign(u @ values.diag() @ vt)
    s = u.T @ found @ vt.T
    torch.testing.assert_close(s, s.diagonal().diag(), rtol=0, atol=1e-10)
    assert ((s.diagonal() > 0.6) & (s.diagonal() < 1.3)).all()
    assert torch.equal(msign(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"engine": "dual"}, "engine"),
        ({"engine": "sequential"}, "engine"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"blocks": "linear"}, "blocks"),
        ({"fold_every": 2}, "fold_every"),
        ({"rounding": "compensated"}, "rounding"),
    ],
)
@pytest.mark.parametrize("name", ["lozo-m", "zo-muon", "subzero-plus", "zo-act"])
def test_what_does_not_go_with_a_subspace_is_refused_by_its_name(name, given, option):
    with pytest.raises(OptionError) as error:
        ZeroOrderOptimizer(build("llama"), name, **given)
    assert error.value.option == option


def test_a_subspace_needs_a_rule_that_moves_and_bases_of_one_kind():
    with pytest.raises(ValueError, match="estimator"):
        Method(None, Sgd(), subspace=KINDS["left"])
    with pytest.raises(ValueError, match="left, right or both, or inputs alone"):
        Subspace()
    with pytest.raises(ValueError, match="left, right or both, or inputs alone"):
        Subspace(left="normal", inputs=True)
