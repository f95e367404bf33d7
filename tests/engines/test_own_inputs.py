"""Directions from the rows' own inputs: what a step is, written down on whole tensors; where v is taken; what else has to hold."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import CAUSAL, V, build
from test_graphs import pretend
from torch import nn
from transformers.pytorch_utils import Conv1D

from zotune import Method, ZeroOrderOptimizer, noise
from zotune.directions import Displacement, signed
from zotune.engines import parts as engine_parts
from zotune.engines.inputs import AnswerTokens
from zotune.engines.places import Copy, Places
from zotune.errors import OptionError
from zotune.estimators import ESTIMATORS
from zotune.models.schemes import prepare
from zotune.noise import reference
from zotune.record.trajectory import Record
from zotune.step.optimizer import StepRecord
from zotune.tasks.scoring import answer_losses, candidate_losses
from zotune.updates import Momentum, ScalarSign

LR, EPS, SEED = 3e-2, 1e-2, 5
LENGTHS = [7, 4, 9, 6]  # tokens of each row, padded on the right


def batch_of(rows: int = 4, answers: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([LENGTHS[i % 4] for i in range(rows)])
    ids = torch.randint(2, V - 2, (rows, int(lengths.max())), generator=draw)
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 0
    positions = lengths[:, None] - answers + torch.arange(answers)
    mask = torch.ones(rows, answers)
    positions[0, 1:], mask[0, 1:] = 0, 0  # an answer of one token
    targets = torch.randint(2, V - 2, (rows, answers), generator=draw)
    return {"input_ids": ids, "positions": positions, "targets": targets, "target_mask": mask}


def row_of(batch: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: t[i : i + 1] for name, t in batch.items()}


def maps_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of the layers, by the names of their weights."""
    found = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return {n: m for n, m in found.items() if any(part.isdecimal() for part in n.split("."))}


def inputs_of(model: nn.Module, batch: dict[str, torch.Tensor], at: int) -> dict[str, torch.Tensor]:
    """x/‖x‖ of each map for a batch of one row, at that token."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda module, args: seen.update({name: args[0].reshape(-1, args[0].shape[-1])[at]})

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in maps_of(model).items()]
    with torch.no_grad():
        answer_losses(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: x / x.norm() for name, x in seen.items()}


def loss_at(model: nn.Module, batch: dict[str, torch.Tensor], move: dict[str, torch.Tensor], by: float) -> float:
    moved = copy.deepcopy(model)
    own = dict(moved.named_parameters())
    with torch.no_grad():
        for name, z in move.items():
            own[name].add_(by * z)
        return float(answer_losses(moved, batch))


def step_by_hand(model: nn.Module, batch: dict[str, torch.Tensor], estimator: str, queries: int, step: int) -> None:
    """θ ← θ − lr·(1/B)(1/Q) Σ_iq g_iq·u_iq·v_iᵀ, a row and a direction at a time."""
    rows, own, maps = len(batch["input_ids"]), dict(model.named_parameters()), maps_of(model)
    total = {name: torch.zeros_like(own[name]) for name in maps}
    for i in range(rows):
        row = row_of(batch, i)
        v = inputs_of(model, row, int(row["positions"].max()))
        moves = []
        for q in range(queries):
            seed, move = signed(noise.step_seed(SEED, step, q, i)), {}
            for name, module in maps.items():
                transposed = isinstance(module, Conv1D)
                out = own[name].shape[1 if transposed else 0]
                u = reference.DRAW["gaussian"](torch.arange(out), seed, noise.parameter_id(f"{name}.U")).double()
                move[name] = v[name][:, None] * u if transposed else u[:, None] * v[name]
            moves.append(move)
        plus = [loss_at(model, row, move, EPS) for move in moves]
        if estimator == "two-sided":
            g = [(a - loss_at(model, row, move, -EPS)) / (2 * EPS) for a, move in zip(plus, moves, strict=True)]
        elif estimator == "one-sided":
            g = [(a - loss_at(model, row, {}, 0)) / EPS for a in plus]
        else:
            g = [queries / (queries - 1) * (a - sum(plus) / queries) / EPS for a in plus]
        for name in maps:
            total[name] += sum(x * move[name] for x, move in zip(g, moves, strict=True)) / (rows * queries)
    with torch.no_grad():
        for name in maps:
            own[name] -= LR * total[name]


def optimizer_of(model: nn.Module, **options) -> ZeroOrderOptimizer:
    return ZeroOrderOptimizer(model, "own-inputs", **({"lr": LR, "eps": EPS, "seed": SEED, "queries": 3} | options))


@pytest.mark.parametrize("forward_tokens", [None, 50])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_step_is_its_formula(name, estimator, forward_tokens):
    model = build(name).double()
    hand, start = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = optimizer_of(model, estimator=estimator, forward_tokens=forward_tokens)
    for step in range(2):
        batch = batch_of((4, 1)[step], seed=step)
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
        step_by_hand(hand, batch, estimator, 3, step)
    assert optimizer.engine.usable, optimizer.engine.why
    moved, begun = dict(model.named_parameters()), dict(start.named_parameters())
    for name, wanted in hand.named_parameters():
        torch.testing.assert_close(moved[name], wanted, rtol=0, atol=1e-6)  # g, lr and u are float32
        assert torch.equal(moved[name], begun[name]) == (name not in maps_of(model))
    assert max((moved[n] - begun[n]).abs().max() for n in moved) > 1e-3
    assert optimizer.forward_passes == 2 * optimizer.forwards_a_step
    assert optimizer.forwards_a_step == {"two-sided": 7, "one-sided": 5, "leave-one-out": 4}[estimator]


@pytest.mark.parametrize("name", list(CAUSAL))
def test_losses_are_the_same_under_any_budget_of_tokens_and_by_separate_forwards(name):
    model = build(name).double()
    batch, found = batch_of(), []
    for forward_tokens in (None, 9, 36, 80):
        optimizer = optimizer_of(model, lr=0.0, forward_tokens=forward_tokens)
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
        assert optimizer.engine.usable, optimizer.engine.why
        found.append(torch.tensor(optimizer.last.losses_P))
    apart = optimizer_of(model, lr=0.0)
    apart.engine.usable = False
    apart.step(lambda batch: answer_losses(model, batch), batch=batch)
    for losses in found:
        torch.testing.assert_close(losses, torch.tensor(apart.last.losses_P), rtol=1e-10, atol=0)
    assert torch.tensor(apart.last.losses_P).std() > 1e-3


def test_batches_of_one_step_are_one_batch():
    """Each row has its own inputs, and the direction of its place in the step, however the rows are cut into batches."""
    model, batch = build("llama").double(), batch_of()
    other = copy.deepcopy(model)
    optimizer_of(model).step(lambda batch: answer_losses(model, batch), batch=batch)
    parts = [{k: t[:1] for k, t in batch.items()}, {k: t[1:] for k, t in batch.items()}]
    optimizer_of(other).step(lambda batch: answer_losses(other, batch), batch=parts)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


# Where v is taken.


def test_x_is_taken_where_the_answer_is_predicted():
    x = torch.arange(24.0).view(2, 4, 3)
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    positions = torch.tensor([[2, 0], [0, 1]])  # the first row's answer is one token, the other a padding
    at = lambda batch, x=x: AnswerTokens(batch, 2).of(x)  # noqa: E731
    assert torch.equal(at({"input_ids": ids, "attention_mask": mask}), torch.stack([x[0, 1], x[1, 2]]))
    assert torch.equal(at({"input_ids": ids, "attention_mask": mask.flip(1)}), x[:, -1])  # padded on the left
    assert torch.equal(
        at({"input_ids": ids, "attention_mask": mask, "positions": positions}), torch.stack([x[0, 2], x[1, 1]])
    )
    assert torch.equal(at({"input_ids": ids}), x[:, -1])
    assert torch.equal(at({"x": x}), x[:, -1])
    assert torch.equal(at(None), x[:, -1])
    masked = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(at(masked, x.flatten(0, 1)), torch.stack([x[0, 1], x[1, 2]]))  # rows × tokens, as OPT has them
    virtual = torch.cat([torch.zeros(2, 5, 3), x], 1)  # a prompt's virtual tokens stand before
    assert torch.equal(at(masked, virtual), torch.stack([x[0, 1], x[1, 2]]))
    chosen = masked | {"positions": positions}
    assert torch.equal(at(chosen, x[:, :2]), torch.stack([x[0, 0], x[1, 1]]))  # what a head reads
    assert torch.equal(at(masked, x[:, 0]), x[:, 0])  # pooled
    assert at(masked, torch.zeros(3, 4, 3)) is None  # not rows


def test_candidates_of_a_row_share_the_mean_of_their_inputs():
    x = torch.randn(6, 4, 3)
    found = AnswerTokens({"input_ids": torch.zeros(6, 4), "labels": torch.zeros(2)}, 2).of(x)
    torch.testing.assert_close(found, x[:, -1].view(2, 3, 3).mean(1))


def test_texts_as_candidates_train():
    """S = rows × candidates sequences, one loss a row."""
    model, batch = build("llama").double(), batch_of(6)
    batch |= {"labels": torch.tensor([0, 2]), "present": torch.ones(2, 3, dtype=torch.bool)}
    optimizer = optimizer_of(model, lr=0.3, forward_tokens=130)
    losses = [float(optimizer.step(lambda b: candidate_losses(model, b), batch=batch)) for _ in range(40)]
    assert optimizer.engine.usable, optimizer.engine.why
    assert losses[-1] < 0.8 * losses[0]


def test_a_closure_s_rows_have_their_own_inputs_too():
    model, other, batch = *(build("opt").double() for _ in range(2)), batch_of()
    batch |= {"positions": torch.full((4, 2), 8)}
    optimizer_of(model).step(lambda: answer_losses(model, batch))
    optimizer_of(other).step(lambda batch: answer_losses(other, batch), batch=batch)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_a_head_alone_moves_by_what_it_is_given():
    model = build("llama", "classifier").double()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score"))
    batch = batch_of()
    batch = {"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1, 2, 1])}
    batch |= {"attention_mask": (batch["input_ids"] != 0).long()}

    def loss(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    optimizer = optimizer_of(model, lr=1.0)
    first, *_, last = (float(optimizer.step(loss, batch=batch)) for _ in range(60))
    assert [optimizer.engine.directions.slots[id(p)].name for p in optimizer.engine.moving] == ["score.weight"]
    assert last < 0.7 * first


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_s_two_maps_each_have_their_inputs(name):
    model = prepare(build(name).double(), "lora")
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) / 8) if "lora_B" in n else None
    batch, found = batch_of(), []
    for forward_tokens, usable in ((None, True), (50, True), (None, False)):
        optimizer = optimizer_of(model, lr=0.0, forward_tokens=forward_tokens)
        optimizer.engine.usable = usable
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
        found.append(torch.tensor(optimizer.last.losses_P))
        assert optimizer.engine.usable == usable, optimizer.engine.why
    assert {id(p) for p in optimizer.engine.moving} == {id(p) for p in model.parameters() if p.requires_grad}
    for losses in found[:2]:
        torch.testing.assert_close(losses, found[2], rtol=1e-6, atol=0)  # an adapter is float32
    assert found[2].std() > 1e-4


# Formats, graphs, failures.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_narrow_weights_take_the_step_of_wide_ones_rounded(name, dtype):
    model, batch = build(name).to(dtype), batch_of()
    start, optimizer = copy.deepcopy(model), optimizer_of(model, lr=0.3, queries=8)
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
    assert optimizer.engine.usable, optimizer.engine.why
    inputs, count = optimizer.engine.inputs, 8 * 4
    coefs = torch.tensor(optimizer.last.g_GQ[0]).double() * -0.3 / count
    moved, begun = dict(model.named_parameters()), dict(start.named_parameters())
    for n, module in maps_of(model).items():
        (u,) = optimizer.engine.factored.drawn(Displacement(optimizer.last.seeds_Q)).of[id(module.weight)]
        v = inputs.of_step[id(module.weight)][..., 0].double()
        assert (v.norm(dim=1) - 1).abs().max() < 4 * torch.finfo(dtype).eps * v.shape[1] ** 0.5
        terms = coefs, u[..., 0].double(), v.repeat(8, 1)
        change, size = (torch.einsum("q,qo,qd->od", *some) for some in (terms, [t.abs() for t in terms]))
        if isinstance(module, Conv1D):
            change, size = change.t(), size.t()
        wanted, room = begun[n].double() + change, torch.finfo(dtype)
        half = (
            wanted.abs() * room.eps / 2 + room.smallest_normal * room.eps
        )  # of a last place, and what float32 sums are off
        assert ((moved[n].double() - wanted).abs() <= 1.01 * half + 2**-21 * size).all()
        assert not torch.equal(moved[n], begun[n])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"estimator": "leave-one-out"}, {"forward_tokens": 50}, {"micro": True}], ids=str
)
def test_a_captured_step_is_the_host_s_to_the_bit(dtype, options, device, monkeypatch):
    """Shapes of several batches take turns, and a step that is skipped, of a row without a number, changes nothing."""
    if device == "cpu":
        pretend(monkeypatch)
    options, host = dict(options), build("gpt2").to(device, dtype)
    micro, captured = options.pop("micro", False), copy.deepcopy(host)
    first, second = optimizer_of(host, **options), optimizer_of(captured, **options)
    first.captured.wanted = False
    f, g = ((lambda batch, m=m: answer_losses(m, batch) * batch["scale"]) for m in (host, captured))
    for step, rows in enumerate([4, 3, 4, 5, 4, 3]):
        batch = batch_of(rows, seed=step) | {"scale": torch.ones(rows, dtype=dtype)}
        if step == 2:
            batch["scale"][1] = torch.nan
        batch = {name: t.to(device) for name, t in batch.items()}
        parts = [{k: t[:1] for k, t in batch.items()}, {k: t[1:] for k, t in batch.items()}] if micro else batch
        before = copy.deepcopy(host)
        first.step(f, batch=parts)
        second.step(g, batch=parts)
        second.land()
        assert repr(first.last) == repr(second.last)
        assert first.last.skipped == (step == 2)
        pairs = list(zip(host.parameters(), captured.parameters(), before.parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q, _ in pairs)
        assert all(torch.equal(p, b) for p, _, b in pairs) == (step == 2)
    assert second.captured.graphs.usable
    assert len(second.captured.graphs) >= 3
    assert first.forward_passes == second.forward_passes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("forward_tokens", [None, 50])
def test_the_kernels_of_low_rank_terms_see_each_row_s_own(name, forward_tokens, monkeypatch):
    """On CUDA u and v are read where a tile of them is needed: v by the part's row, u by its direction."""
    kernels, normed = pytest.importorskip("zotune.engines.kernels"), []
    plain = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, *rest: normed.append(x.shape[0]) or plain(x, *rest))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, found = build(name, wide=True).to(device), []
    batch = {k: t.to(device) for k, t in batch_of().items()}
    for served in ({"cuda", "cpu"}, set()):
        monkeypatch.setattr(engine_parts, "KERNEL_DEVICES", served)
        optimizer = optimizer_of(model, lr=0.0, forward_tokens=forward_tokens)
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
        optimizer.land()
        assert optimizer.engine.usable, optimizer.engine.why
        found.append(torch.tensor(optimizer.last.losses_P))
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=0)
    assert ({*normed} == {1}) == (name == "llama")  # norms, which stay, by the kernel for all parts at once
    assert (found[0].view(3, 2, 4)[:, 0] - found[0].view(3, 2, 4)[:, 1]).abs().mean() > 1e-3


def test_an_input_that_is_no_number_leaves_the_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    start, optimizer = copy.deepcopy(model.state_dict()), optimizer_of(model)
    x = torch.tensor([[1.0, 2.0, 3.0], [torch.inf, 0.0, 1.0]])
    optimizer.step(lambda batch: model(batch["x"]).square().mean(1), batch={"x": x})
    assert optimizer.last.skipped
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items())
    optimizer.step(
        lambda batch: model(batch["x"]).square().mean(1), batch={"x": torch.zeros(2, 3)}
    )  # x of no direction
    assert not optimizer.last.skipped
    assert torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[2].weight, start["2.weight"])


def test_lr_0_leaves_every_bit():
    model, batch = build("llama"), batch_of()
    start, optimizer = copy.deepcopy(model.state_dict()), optimizer_of(model, lr=0.0)
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items())


def test_at_equal_passes_the_loss_falls_four_times_as_far_as_by_blind_directions():
    """Each at the best of its rates, a direction for each row and query, fresh rows every step."""
    teacher, chance, fallen = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), 1.3863, {}
    for method, rates in (("zo-sgd", (3e-3, 1e-2)), ("own-inputs", (3e-2, 1e-1))):
        for lr in rates:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
            optimizer = ZeroOrderOptimizer(model, method, lr=lr, eps=EPS, seed=SEED, queries=4, groups="batch")
            draw, found = torch.Generator().manual_seed(1), []

            def loss(batch, model=model):
                return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

            while optimizer.forward_passes + optimizer.forwards_a_step <= 720:
                x = torch.randn(8, 64, generator=draw)
                found.append(float(optimizer.step(loss, batch={"x": x, "y": (x @ teacher).argmax(1)})))
            fallen[method] = max(chance - sum(found[-20:]) / 20, fallen.get(method, 0.0))
    assert fallen["zo-sgd"] > 0.01
    assert fallen["own-inputs"] > 4 * fallen["zo-sgd"], fallen


# What it does not go with, and what cannot be had again.


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"groups": 1}, "groups"),
        ({"groups": 2}, "groups"),
        ({"rank": 2}, "rank"),
        ({"fold_every": 2}, "fold_every"),
        ({"rounding": "compensated"}, "rounding"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"blocks": "linear"}, "blocks"),
        ({"engine": "dual"}, "engine"),
        ({"engine": "sequential"}, "engine"),
        ({"method": Method(rule=Momentum(), own_inputs=True)}, "method"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, option):
    options = {"method": "own-inputs"} | options
    with pytest.raises(OptionError) as refused:
        ZeroOrderOptimizer(build("llama"), **options)
    assert refused.value.option in (option, "groups")


def test_a_method_of_one_s_own_may_have_them():
    model = build("llama")
    optimizer = ZeroOrderOptimizer(model, Method(rule=ScalarSign(), own_inputs=True), groups="batch", lr=1e-2, eps=EPS)
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch_of())
    assert optimizer.forward_passes == 3
    with pytest.raises(ValueError, match="estimator"):
        Method(None, own_inputs=True)


def test_a_model_without_linear_maps_of_rows_is_refused_by_what_would_help():
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = optimizer_of(nn.ParameterDict({"w": weight}))
    with pytest.raises(ValueError, match="nothing that trains is read as a linear map"):
        optimizer.step(lambda batch: (batch["x"] @ weight).mean(1), batch={"x": torch.ones(2, 3)})


def test_one_loss_for_all_rows_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"return one a row|numbers for"):
        optimizer_of(model).step(lambda batch: model(batch["x"]).mean(), batch={"x": torch.ones(2, 3)})


def test_recorded_steps_are_refused():
    model, batch = build("llama"), batch_of()
    optimizer = optimizer_of(model)
    assert optimizer.method.needs_rows
    optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
    taken: StepRecord = optimizer.last
    record = Record(1, 0.0, 0.0, taken.g_GQ[0], taken.lr_G, taken.decay_G, False)
    for again in (lambda: optimizer.apply_record(record), lambda: optimizer.apply_records([record])):
        with pytest.raises(ValueError, match="function of its rows too"):
            again()


def test_an_optimizer_goes_on_from_its_state():
    model = build("llama").double()
    optimizer = optimizer_of(model)
    for step in range(2):
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch_of(seed=step))
    other = copy.deepcopy(model)
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch_of(seed=step))
        resumed.step(lambda batch: answer_losses(other, batch), batch=batch_of(seed=step))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert resumed.forward_passes == optimizer.forward_passes


def test_places_in_any_order_have_their_rows_inputs():
    """θ itself among them, directions in any order: as the estimator of somebody's own may ask."""
    model, batch = build("llama").double(), batch_of()
    engine = optimizer_of(model).engine
    at = Displacement(tuple(range(40, 52)), ((1e-2,) * 12,))
    copies = (Copy(1, 8), Copy(0), Copy(-1, 0), Copy(1, 4), Copy(0))
    found = engine.losses(lambda b: answer_losses(model, b), batch, Places(at, copies, (1,) * 4))
    assert engine.usable, engine.why
    torch.testing.assert_close(found[1], answer_losses(model, batch).detach(), rtol=1e-12, atol=0)
    engine.usable = False
    apart = engine.losses(lambda b: answer_losses(model, b), batch, Places(at, copies, (1,) * 4))
    torch.testing.assert_close(found, apart, rtol=1e-11, atol=0)
