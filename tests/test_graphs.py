"""A captured step does what the host would: on a CUDA device, and without one what a graph would hold, run as plain functions."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zotune import ZeroOrderOptimizer
from zotune.engines.following import capturing
from zotune.estimators import LeaveOneOut, OneSided, TwoSided
from zotune.methods import Method
from zotune.models.schemes import get_scheme
from zotune.record.scalars import coefficient, float32
from zotune.record.trajectory import Record
from zotune.step import captured as captured_steps
from zotune.step import descent, graphs
from zotune.step.arithmetic import Given, applicable, coefficients, projected, weights_of
from zotune.step.descent import DescentGraphs
from zotune.step.graphs import Shape, StepGraphs, _Captured
from zotune.updates import Adam, Conservative, MeanSquare, Momentum, Normalised, ScalarSign, Sgd, Sign
from zotune.updates import rule as rules

CONFIG = tf.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def steps_apart(plain: ZeroOrderOptimizer, captured: ZeroOrderOptimizer, f, g, batches) -> None:
    """The same steps by both, the first without graphs."""
    plain.captured.wanted = False
    for batch in batches:
        plain.step(f, batch=batch)
        captured.step(g, batch=batch)


AFTER = {
    "meazo": {}, "grzo": {}, "copes": {"queries": 8}, "lozo-m": {}, "zo-muon": {"rank": 16}, "subzero-plus": {"queries": 9},
    "zo-act": {}, "aim-zo": {"queries": 4},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", list(AFTER))
def test_captured_steps_of_methods_after_the_paper_give_the_weights_of_steps_without(method, dtype):
    torch.manual_seed(0)
    plain = tf.LlamaForCausalLM(CONFIG).to("cuda", dtype).eval()
    captured = copy.deepcopy(plain)
    before = [p.detach().clone() for p in plain.parameters()]
    batches = [{"input_ids": torch.randint(0, 64, (4, 8 + 8 * (i % 2)), device="cuda")} for i in range(6)]

    def loss_of(model):
        def rows(batch):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            return losses.mean(1)

        return rows

    first, second = (ZeroOrderOptimizer(m, method, seed=1, eps=1e-2, **AFTER[method]) for m in (plain, captured))
    steps_apart(first, second, loss_of(plain), loss_of(captured), batches)
    second.land()
    assert second.captured.graphs is not None
    assert second.captured.graphs.usable
    assert first.forward_passes == second.forward_passes
    if (method, dtype) == ("subzero-plus", torch.bfloat16):
        # Adam's first moves are signs, at a rate of 2e-2: losses that are 1e-3 off, as two kernels' in 16 bits, turn those of
        # elements near 0, which is 0.18 of the way here.
        moved, other = (
            torch.cat([(p.float() - q.float()).flatten() for p, q in zip(m.parameters(), before, strict=True)])
            for m in (plain, captured)
        )
        assert (moved - other).norm() < 0.3 * moved.norm()
        return
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["leave-one-out", "own-inputs"])
def test_captured_steps_find_the_rates_of_steps_without(method):
    """The first goes by what it found itself and is taken by the host; the others go by steps that have landed."""
    torch.manual_seed(0)
    plain = tf.LlamaForCausalLM(CONFIG).to("cuda").eval()
    captured = copy.deepcopy(plain)
    batches = [{"input_ids": torch.randint(0, 64, (4, 8), device="cuda")} for _ in range(8)]

    def loss_of(model):
        def rows(batch):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            return losses.mean(1)

        return rows

    first, second = (
        ZeroOrderOptimizer(m, method, lr="auto", queries=4, groups="batch", total_steps=8) for m in (plain, captured)
    )
    rates: dict[int, list[float]] = {0: [], 1: []}
    for i, optimizer in enumerate((first, second)):
        optimizer.watch = lambda record, i=i: rates[i].append(record.lr_G[0])
    steps_apart(first, second, loss_of(plain), loss_of(captured), batches)
    first.flush()
    second.flush()
    assert second.captured.graphs is not None
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-4, atol=0)
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
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
    steps_apart(first, second, loss_of(plain), loss_of(captured), batches)
    first.flush()
    second.flush()
    assert getattr(second.engine, "usable", True)
    assert second.captured.graphs is not None
    assert second.captured.graphs.usable
    assert len(second.captured.graphs) == 2
    assert first.forward_passes == second.forward_passes == 16
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.gpu
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
    first.captured.wanted = False
    f, g = loss_of(plain), loss_of(captured)
    for _ in range(8):
        first.step(f, batch=batch)
        second.step(g, batch=batch)
    assert second.captured.graphs.usable
    assert second.state_bytes == first.state_bytes
    assert not torch.equal(before["lm_head.weight"], captured.state_dict()["lm_head.weight"])
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.gpu
def test_a_loss_that_draws_dropout_is_not_captured_and_still_steps():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).cuda().train()
    optimizer = ZeroOrderOptimizer(model, lr=1e-3)
    batch = {"x": torch.randn(4, 8, device="cuda")}
    for _ in range(2):
        optimizer.step(lambda batch: model(batch["x"]).square().mean(), batch=batch)
    assert not optimizer.captured.graphs.usable
    assert optimizer.steps == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "chosen"),
    [
        ("lora", {"engine": "dual"}),
        ("lora", {"groups": "batch"}),
        ("lora", {}),
        ("prefix", {}),
        ("prompt", {}),
        ("head", {}),
    ],
)
def test_steps_of_a_scheme_are_captured(scheme, chosen, dtype, monkeypatch):
    kernels, added = import_module("zotune.engines.kernels"), []
    outer = kernels.adapter_outer
    monkeypatch.setattr(kernels, "adapter_outer", lambda *args: (added.append(capturing()), outer(*args)))
    torch.manual_seed(0)
    plain = get_scheme(scheme).prepare(tf.LlamaForCausalLM(CONFIG).to(dtype)).cuda().eval()
    captured = copy.deepcopy(plain)
    ids = [torch.randint(0, 64, (4, 8 + 8 * (i % 2)), device="cuda") for i in range(6)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]

    def loss_of(model):
        def rows(batch):
            logits = model(**batch).logits[:, -1].float()
            return nn.functional.cross_entropy(logits, batch["input_ids"][:, 0], reduction="none")

        return rows

    first, second = (
        ZeroOrderOptimizer([p for p in m.parameters() if p.requires_grad], lr=1e-3, eps=1e-2, seed=1, **chosen)
        for m in (plain, captured)
    )
    steps_apart(first, second, loss_of(plain), loss_of(captured), batches)
    second.land()
    assert second.captured.graphs is not None
    assert second.captured.graphs.usable
    assert len(second.captured.graphs) == 2
    assert {*added} == ({True, False} if chosen else {*added})  # adapters are kernels, in graphs and without
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)


class Toy(nn.Module):
    """A weight and a bias; a row's loss has curvature in both. by_library: the product too, whose bits a GPU's library chooses."""

    def __init__(self, by_library: bool = True) -> None:
        super().__init__()
        self.map, self.by_library = nn.Linear(6, 5), by_library

    def losses(self, batch):
        x, weight, bias = batch["x"], self.map.weight, self.map.bias
        y = self.map(x) if self.by_library else (x[:, None] * weight).sum(2) + bias
        return torch.tanh(y).square().sum(1).float() * batch["scale"]


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tf.LlamaForCausalLM(CONFIG)

    def losses(self, batch):
        ids = batch["x"]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return (
            nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1) * batch["scale"]
        )


def model_of(kind: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return Llama().cuda().eval()
    followed = "engine" in options or "groups" in options
    return Toy(by_library=kind == "cpu" or followed).to(kind).eval()


def batches_of(kind: str, dtype: torch.dtype, micro: int) -> list:
    """Six steps' batches of two shapes; the loss of the third is not a number."""
    draw, found = torch.Generator().manual_seed(1), []
    for step in range(6):
        some = []
        for _ in range(micro):
            rows = 2 + step % 2
            x = torch.randn(rows, 6, generator=draw).to(dtype)
            if kind == "llama":
                x = torch.randint(0, 64, (4, 8 * rows), generator=draw)
            scale = torch.full((len(x),), math.nan if step == 2 else 1.0)
            device = "cpu" if kind == "cpu" else "cuda"
            some.append({"x": x.to(device), "scale": scale.to(device)})
        found.append(some[0] if micro == 1 else some)
    return found


def pretend(monkeypatch) -> None:
    """On the CPU: a graph is the function that it would hold, and the passes of CUDA run in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels run on a CPU's tensors in Triton's interpreter alone, which is not at hand beside CUDA")

    def captured(self, held, device):
        def run():
            with self.own_scratch() if isinstance(self, StepGraphs) else nullcontext():
                held.run()

        run()  # as a capture does, before anything may change
        held.graph = SimpleNamespace(replay=run)
        return True

    for kind in (StepGraphs, DescentGraphs):
        monkeypatch.setattr(kind, "_captured", captured)
    monkeypatch.setattr(captured_steps, "_on_cuda", lambda value: isinstance(value, torch.Tensor))
    for module in (rules, graphs, captured_steps):
        monkeypatch.setattr(module, "passes_for", lambda directions: import_module("zotune.updates.fused"))
    monkeypatch.setattr(descent, "passes_on", lambda devices: import_module("zotune.updates.fused"))


def test_graphs_of_several_lengths_share_their_scratch(monkeypatch):
    """Which holds copies of weights: memory does not grow with the shapes of batches."""
    pretend(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 160), nn.Tanh(), nn.Linear(160, 192), nn.Tanh(), nn.Linear(192, 160))
    optimizer = ZeroOrderOptimizer(model, engine="sequential", lr=1e-3, eps=1e-2, seed=1)
    loss = lambda batch: model(batch["x"]).square().mean()  # noqa: E731
    held = []
    for rows in (3, 5, 2, 4):
        optimizer.step(loss, batch={"x": torch.randn(rows, 192)})
        held.append(sum(buffer.numel() for buffer in optimizer.captured.graphs._scratch._free))
    assert len(optimizer.captured.graphs) == 4
    assert held == [held[0]] * 4
    assert held[0] == 4 * 160 * 192


def optimizer_of(model: nn.Module, captured: bool = True, **options) -> ZeroOrderOptimizer:
    """Matrices decay, if anything does."""
    decay = options.pop("weight_decay", 0.0)
    named = list(model.named_parameters())
    params = [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": decay},
        {"params": [(n, p) for n, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    made = ZeroOrderOptimizer(params, **({"eps": 1e-2, "seed": 1} | options))
    if not captured:
        made.captured.wanted = False
    return made


def take(made: ZeroOrderOptimizer, loss, batch, step: int):
    for group in made.param_groups:
        group["lr"] = 0.01 / (1 + step)
    made.step(loss, batch=batch)
    made.land()
    return made.last


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


KINDS = ["cpu", *(pytest.param(kind, marks=pytest.mark.gpu) for kind in ("cuda", "llama"))]
PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.float16),  # Triton's interpreter truncates to bfloat16
    *(
        pytest.param(kind, dtype, marks=pytest.mark.gpu)
        for kind in ("cuda", "llama")
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
STEPS = [
    {"method": "zo-sgd", "weight_decay": 0.3, "estimator": "one-sided"},
    {"method": "zo-sgd", "weight_decay": 0.3, "g_clip": 0.5, "queries": 3},
    {"method": "zo-sgd", "weight_decay": 0.3, "rounding": "compensated", "micro": 2},
    {"method": "zo-sgd", "weight_decay": 0.3, "engine": "dual", "micro": 2},
    {"method": "zo-sgd", "weight_decay": 0.3, "groups": "batch", "micro": 2},
    {"method": "zo-sgd-sign", "weight_decay": 0.3, "sign_mode": "scalar", "queries": 2},
    {"method": "zo-sgd-sign", "weight_decay": 0.3, "queries": 2, "direction": "rademacher"},
    {"method": "zo-sgd-sign", "rounding": "compensated", "micro": 2},
    {"method": "zo-sgd-mmt", "weight_decay": 0.3, "state_dtype": "bfloat16", "micro": 2},
    {"method": "zo-sgd-mmt", "rounding": "compensated", "estimator": "one-sided", "queries": 2},
    {"method": "zo-adam", "weight_decay": 0.3, "g_clip": 0.5, "queries": 3},
    {"method": "zo-adam", "rounding": "compensated", "state_dtype": "parameter", "engine": "dual", "micro": 2},
    {"method": "zo-sgd-cons", "queries": 2, "micro": 2},
    {"method": "zo-sgd-cons", "estimator": "one-sided", "rounding": "compensated", "g_clip": 0.5},
    {"method": "forward-grad", "weight_decay": 0.3, "g_clip": 0.5, "queries": 2, "micro": 2},
    {"method": "zo-sgd", "weight_decay": 0.3, "sparsity": 0.5, "mask_refresh": 2, "micro": 2},
    {"method": "zo-sgd", "sparsity": 0.5, "mask": "magnitude", "mask_refresh": 4, "rounding": "compensated"},
    {"method": "zo-adam", "sparsity": 0.5, "mask": "magnitude", "sparsity_scope": "global", "mask_refresh": 3},
    {
        "method": "forward-grad",
        "sparsity": 0.5,
        "sparsity_scope": "global",
        "mask_refresh": 2,
        "direction": "rademacher",
    },
    {"method": "zo-sgd-cons", "sparsity": 0.5},
]


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # before anything is armed
@pytest.mark.parametrize("options", STEPS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(("kind", "dtype"), PLACES, ids=str)
def test_a_captured_step_is_the_host_s_to_the_bit_and_its_record_gives_it_again(kind, dtype, options, monkeypatch):
    """lr changes from step to step, the third is skipped, and after the fourth another optimizer goes on from the state."""
    if kind == "cpu":
        pretend(monkeypatch)
    options = dict(options)
    batches = batches_of(kind, dtype, options.pop("micro", 1))
    host = model_of(kind, options).to(dtype)
    # a library's products in float32 may differ in a graph; whatever its losses are, its record gives the weights again
    exact = kind == "cpu" or dtype == torch.bfloat16 or not getattr(host, "by_library", True)
    captured, replayed, start = (copy.deepcopy(host) for _ in range(3))
    first, second = optimizer_of(host, captured=False, **options), optimizer_of(captured, **options)
    again = optimizer_of(replayed, **options)
    f, g = host.losses, captured.losses
    for step, batch in enumerate(batches):
        before, saved = copy.deepcopy(captured), copy.deepcopy(second.state_dict()["state"])
        wanted, got = take(first, f, batch, step), take(second, g, batch, step)
        assert second.captured.graphs is not None
        assert second.captured.graphs.usable
        assert not exact or repr(got) == repr(wanted)
        assert got.skipped == wanted.skipped == (step == 2)
        if got.skipped:
            assert same(captured, before)
            torch.testing.assert_close(second.state_dict()["state"], saved, rtol=0, atol=0)
        scalars = ([float32(x) for x in values] for values in (got.g_GQ[0], got.lr_G, got.decay_G))
        again.pairs = second.pairs
        again.apply_record(Record(step, 0.0, 0.0, *map(tuple, scalars), got.skipped, choice=got.choice))
        first.settle()
        second.settle()
        if step == 3:
            resumed = optimizer_of(captured, **options)
            resumed.load_state_dict(copy.deepcopy(second.state_dict()))
            second = resumed
    assert same(replayed, captured)
    for p, q in zip(captured.parameters(), host.parameters(), strict=True):
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
        if options["method"] == "zo-adam" and not exact:
            # Adam moves an element whose estimate is near zero by a ratio of two small numbers, up to lr: it may be off, alone
            off = ~torch.isclose(p, q, rtol=1e-3, atol=1e-3)
            assert off.sum() <= 1e-3 * off.numel()
            assert (p - q).abs().max() <= 2 * sum(0.01 / (1 + step) for step in range(len(batches)))
        else:
            torch.testing.assert_close(p, q, **close)
    assert not same(captured, start)
    assert second.forward_passes == first.forward_passes
    assert second.state_bytes == first.state_bytes
    if exact:
        torch.testing.assert_close(second.state_dict()["state"], first.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"fold_every": 3}, {"fold_every": 2, "queries": 2, "direction": "rademacher"}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_forward_grad_folds_as_the_host_does(kind, options, monkeypatch):
    if kind == "cpu":
        pretend(monkeypatch)
    options = {"method": "forward-grad", **options}
    host = model_of(kind, options)
    captured, start = copy.deepcopy(host), copy.deepcopy(host)
    first, second = optimizer_of(host, captured=False, **options), optimizer_of(captured, **options)
    for step, batch in enumerate(batches_of(kind, torch.float32, 1) + batches_of(kind, torch.float32, 1)[:2]):
        assert repr(take(second, captured.losses, batch, step)) == repr(take(first, host.losses, batch, step))
    first.flush()
    second.flush()
    assert second.captured.graphs.usable
    assert same(captured, host)
    assert not same(captured, start)


@pytest.mark.parametrize("mask", ["random", "magnitude", "wanda"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_redrawn_mask_is_where_the_graphs_look_for_it(kind, mask, monkeypatch):
    """They go on, and take the host's steps; where it is in memory does not change."""
    if kind == "cpu":
        pretend(monkeypatch)
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).to(kind, torch.float64)  # names of layers
    captured = copy.deepcopy(host)
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 2**63 + 5, "sparsity": 0.5, "mask": mask, "mask_refresh": 2}
    first, second = (ZeroOrderOptimizer(model, **options) for model in (host, captured))
    first.captured.wanted = False
    f, g = (lambda batch, model=model: model(batch["x"]).square().mean(1) for model in (host, captured))
    places, graphs_seen, masks = set(), set(), []
    for step in range(7):
        batch = {"x": torch.randn(3 + step % 2, 12, dtype=torch.float64).to(kind)}
        first.step(f, batch=batch)
        second.step(g, batch=batch)
        kept = [state["kept"] for state in second.state.values() if state.get("kept") is not None]
        places.add(tuple(t.data_ptr() for t in kept))
        masks.append([t.clone() for t in kept])
        graphs_seen.add(id(second.captured.graphs))
    assert second.captured.graphs.usable
    assert len(places) == len(graphs_seen) == 1
    assert (len(masks[0]) > 0) == (mask != "random")
    if mask != "random":
        assert any(not torch.equal(a, b) for a, b in zip(masks[0], masks[-1], strict=True))
    second.flush()
    for p, q in zip(host.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0 if kind == "cpu" else 1e-9, atol=0 if kind == "cpu" else 1e-9)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("options", [{"method": "zo-adam"}, {"method": "zo-sgd", "rounding": "compensated"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_loaded_is_what_the_next_captured_step_sees(kind, options, monkeypatch):
    if kind == "cpu":
        pretend(monkeypatch)
    model = model_of(kind, options).to(torch.bfloat16)
    made, batches, loss = optimizer_of(model, **options), batches_of(kind, torch.bfloat16, 1), model.losses
    for step in range(2):
        take(made, loss, batches[step], step)
    weights, state = copy.deepcopy(model), copy.deepcopy(made.state_dict())
    ends = []
    for _ in range(2):
        with torch.no_grad():
            for p, q in zip(model.parameters(), weights.parameters(), strict=True):
                p.copy_(q)
        made.load_state_dict(copy.deepcopy(state))
        for step in range(3, 6):
            take(made, loss, batches[step], step)
        ends.append(copy.deepcopy(model))
    assert made.captured.graphs is not None
    assert same(*ends)
    assert not same(ends[0], weights)


numbers = st.floats(-1e5, 1e5) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-300, 3e38])


def decided(estimator, rule, losses_CK, eps, lr, most, room, shares, pairs):
    """What a step decides, in Python's own floats: g, whether it is applied, and coefficients."""
    columns = [list(column) for column in zip(*losses_CK, strict=True)]
    d_KQ = []
    for losses in columns:
        if isinstance(estimator, TwoSided):
            d_KQ.append([(losses[2 * q] - losses[2 * q + 1]) / 2 for q in range(estimator.queries)])
        else:
            d_KQ.append([loss - losses[0] for loss in losses[1:]])
    weights = [share * pairs / sum(shares) for share in shares]
    d_QK = [[d * w for d, w in zip(row, weights, strict=True)] for row in zip(*d_KQ, strict=True)]
    g_Q = [g for row in d_QK for g in [d / eps for d in row] + [0.0] * (pairs - len(shares))]
    if most is not None:
        g_Q = [g if g != g else min(max(g, -most), most) for g in g_Q]
    signs = [g if g != g else float((g > 0) - (g < 0)) for g in map(float32, g_Q)]
    kind = type(rule)
    if kind in (Sgd, Conservative, ScalarSign):
        reach = [coefficient(lr, g, 1 / len(g_Q)) for g in (signs if kind is ScalarSign else g_Q)]
    else:
        reach = [lr * g for g in g_Q] if kind is Momentum else [*g_Q, lr]
    finite = all(math.isfinite(loss) for losses in losses_CK for loss in losses)
    return g_Q, finite and all(abs(c) < room for c in reach), reach


@settings(max_examples=300)
@given(
    losses=st.lists(numbers, min_size=24, max_size=24),
    queries=st.integers(1, 4),
    shares=st.sampled_from([(1,), (2, 2), (2, 1, 2)]),
    lacking=st.integers(0, 2),
    estimator=st.sampled_from([TwoSided, OneSided]),
    eps=st.floats(1e-6, 1.0),
    lr=st.floats(0.0, 1e6),
    most=st.none() | st.floats(1e-3, 1e6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rule=st.sampled_from([Sgd(), ScalarSign(), Conservative(), Sign(), Momentum(), Adam()]),
)
def test_what_a_step_decides_on_the_device_is_what_the_host_decides(
    losses, queries, shares, lacking, estimator, eps, lr, most, dtype, rule
):
    """One set of functions serves both; to the bit it is what Python's floats give, as a run's record is made of."""
    asks, directions = estimator(queries), len(shares)
    rows = [losses[c * directions : (c + 1) * directions] for c in range(len(asks.probes))]
    pairs, room = directions + lacking * (directions > 1), torch.finfo(dtype).max / 16
    weights = weights_of(shares, pairs)
    given = Given(*(torch.tensor([x], dtype=torch.float64) for x in (eps, lr)), weights, pairs, most, room)
    losses_CK = torch.tensor(rows, dtype=torch.float64)
    wanted, goes, coefs = decided(asks, rule, rows, eps, lr, most, room, shares, pairs)
    g_GQ = projected(asks, rule, losses_CK, given)
    torch.testing.assert_close(g_GQ[0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
    assert bool(applicable(rule, losses_CK, g_GQ, given)) == goes
    if goes and rule.linear:
        assert coefficients(rule, g_GQ, given.lr_G, torch.tensor(True))[0].tolist() == coefs


@given(losses=st.lists(st.sampled_from([1.0, 2.0, -1.0, math.nan, math.inf, -math.inf]), min_size=3, max_size=3))
def test_a_choice_is_the_first_least_loss(losses):
    choice = int(Conservative().choose(torch.tensor(losses, dtype=torch.float64)))
    best = 0
    for other in (1, 2):
        best = other if losses[other] < losses[best] else best
    assert choice == best


class NoHost(TorchDispatchMode):
    """Refuses tensors on the CPU, which no graph can read again; arithmetic alone takes numbers with its kernel."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        arithmetic = func._opname in ("add", "sub", "mul", "div", "eq", "ne", "lt")
        touched = pytree.tree_leaves(out if arithmetic else (out, args, kwargs))
        if any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in touched):
            raise AssertionError(f"{func} needs the host")
        return out


RULES = [Sgd(), ScalarSign(), Conservative(), Normalised(), MeanSquare(), Sign(), Momentum(), Adam()]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("estimator", [TwoSided(3), OneSided(3), LeaveOneOut(3)], ids=repr)
@pytest.mark.parametrize("shares", [(1,), (3, 3, 2)], ids=str)
def test_a_captured_step_needs_no_number_from_the_host(rule, estimator, shares, monkeypatch):
    """On meta tensors, which have no numbers; kernels left out. Directions of unequal rows have weights that are not 1."""
    applied = []

    def run(seeds_Q, g_GQ, numbers_GN, goes):
        applied.append([g_GQ])

    monkeypatch.setattr(
        graphs, "passes_for", lambda directions: SimpleNamespace(Update=lambda *args: SimpleNamespace(run=run))
    )
    writer = SimpleNamespace(
        directions=SimpleNamespace(params=[], slots={}), holds=False,
        apply=lambda by, at_once: applied.append(by.coefs_GQ),
    )  # fmt: skip
    engine = SimpleNamespace(
        directions=writer.directions, writer=writer, loss=lambda closure, at: closure(),
        losses=lambda loss, batch, places: torch.stack([loss(batch)] * len(places.copies)),
    )  # fmt: skip
    held = StepGraphs(engine, Method(estimator, rule), (1e-3, 1e-2), 1e5, 0.5, {})
    batch = {"x": torch.ones(8, device="meta")}
    decays, pairs = not isinstance(rule, Conservative), len(shares) + (len(shares) > 1)
    step = _Captured(held, lambda batch: batch["x"] * 1.0, [batch], Shape(shares, pairs, decays, 1))
    with NoHost():
        step.run()
        with pytest.raises(AssertionError, match="host"):
            step.armed.copy_(torch.tensor(1.0))
    assert all(c.dtype == torch.float32 and c.device.type == "meta" for coefs in applied for c in coefs)
    assert applied


# Back-propagation.


def first_order_apart(host, captured, optimizers, losses, batches) -> None:
    """Steps of both at rates that fall, the first without graphs; what they saw is the same as far as rounding goes."""
    first, second = optimizers
    first.captured.wanted = False
    for step, batch in enumerate(batches):
        wanted, got = (take(made, loss, batch, step) for made, loss in zip(optimizers, losses, strict=True))
        assert second.captured.graphs is not None
        assert second.captured.graphs.usable
        assert got.skipped == wanted.skipped
        assert got.seeds_Q == wanted.seeds_Q == ()
        assert got.g_GQ == wanted.g_GQ
        torch.testing.assert_close(
            torch.tensor(got.losses_P), torch.tensor(wanted.losses_P), rtol=1e-2, atol=1e-3, equal_nan=True
        )


FIRST_ORDER = [
    {"method": "fo-sgd", "weight_decay": 0.3},
    {"method": "fo-sgd", "rounding": "compensated"},
    {"method": "fo-adam", "weight_decay": 0.3},
    {"method": "fo-adam", "state_dtype": "parameter", "micro": 2},
]


@pytest.mark.parametrize("options", FIRST_ORDER, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(("kind", "dtype"), PLACES, ids=str)
def test_a_captured_step_by_back_propagation_is_the_host_s(kind, dtype, options, monkeypatch):
    """lr changes, the third step is skipped, a parameter that no loss reads keeps no moments, and the state goes on in another."""
    options = dict(options)
    batches = batches_of(kind, dtype, options.pop("micro", 1))
    if kind == "cpu":
        pretend(monkeypatch)
    host = model_of(kind, options).to(dtype)
    host.unread = nn.Parameter(torch.ones(3, dtype=dtype, device=next(host.parameters()).device))
    captured, start = copy.deepcopy(host), copy.deepcopy(host)
    first, second = optimizer_of(host, captured=False, **options), optimizer_of(captured, **options)
    for some in (batches[:4], batches[4:]):
        first_order_apart(host, captured, (first, second), (host.losses, captured.losses), some)
        for p, q in zip(captured.parameters(), host.parameters(), strict=True):
            close = {torch.float32: 1e-4, torch.float64: 1e-9}.get(dtype, 2e-2)
            if options["method"] == "fo-adam" and kind != "cpu":
                # a gradient near zero is a ratio of two small numbers to Adam, which another order of sums may turn
                assert (~torch.isclose(p, q, rtol=close, atol=close)).sum() <= 1e-2 * p.numel()
                assert (p - q).abs().max() <= 2 * sum(0.01 / (1 + step) for step in range(len(batches))) + close
            else:
                torch.testing.assert_close(p, q, rtol=close, atol=close)
            assert second.state[p].keys() == first.state[q].keys()
            assert second.state[p].get("steps") == first.state[q].get("steps")
        state = copy.deepcopy(second.state_dict())
        second = optimizer_of(captured, **options)
        second.load_state_dict(state)
    assert second.skipped_steps == 1
    assert second.forward_passes == first.forward_passes
    assert second.state_bytes == first.state_bytes
    assert torch.equal(captured.unread, start.unread)
    assert not same(captured, start)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_rule_that_has_no_pass_of_its_own_descends_without_graphs(kind, monkeypatch):
    class Halved(Sgd):
        def move(self, w_n, g_n, state, lr, steps):
            return w_n - lr / 2 * g_n

    if kind == "cpu":
        pretend(monkeypatch)
    halved, plain = model_of(kind, {}), model_of(kind, {})
    made = [
        ZeroOrderOptimizer(m, Method(None, rule), lr=lr)
        for m, rule, lr in ((halved, Halved(), 0.2), (plain, Sgd(), 0.1))
    ]
    for optimizer, model in zip(made, (halved, plain), strict=True):
        optimizer.step(model.losses, batch=batches_of(kind, torch.float32, 1)[0])
        optimizer.land()
    assert made[0].captured.graphs is None
    assert made[1].captured.graphs.usable
    for p, q in zip(halved.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("method", ["fo-sgd", "fo-adam"])
def test_first_order_steps_of_a_scheme_are_captured(method, scheme, dtype):
    """Two lengths, each a graph; the losses of both ways go down alike."""
    torch.manual_seed(0)
    plain = get_scheme(scheme).prepare(tf.LlamaForCausalLM(CONFIG).to(dtype)).cuda().eval()
    captured = copy.deepcopy(plain)
    batches = [{"input_ids": torch.randint(0, 64, (4, 8 + 8 * (i % 2)), device="cuda")} for i in range(2)] * 8

    def loss_of(model):
        def rows(batch):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            return losses.mean(1)

        return rows

    lr = 1e-2 if method == "fo-adam" else 0.5
    first, second = (
        ZeroOrderOptimizer([p for p in m.parameters() if p.requires_grad], method, lr=lr) for m in (plain, captured)
    )
    seen: tuple[list[float], list[float]] = ([], [])
    for optimizer, losses in zip((first, second), seen, strict=True):
        optimizer.watch = lambda record, losses=losses: losses.append(record.loss)
    steps_apart(first, second, loss_of(plain), loss_of(captured), batches)
    second.land()
    assert second.captured.graphs.usable
    assert len(second.captured.graphs) == 2
    torch.testing.assert_close(torch.tensor(seen[0]), torch.tensor(seen[1]), rtol=3e-2, atol=1e-2)
    assert seen[1][-1] < seen[1][0]


@pytest.mark.gpu
@pytest.mark.parametrize("why", ["dropout", "checkpointing"])
def test_what_a_graph_cannot_hold_of_back_propagation_is_said_and_still_stepped(why, caplog):
    torch.manual_seed(0)
    if why == "dropout":
        model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).cuda().train()
        loss_of, batch = lambda batch: model(batch["x"]).square().mean(1), {"x": torch.randn(4, 8, device="cuda")}
    else:
        model = tf.LlamaForCausalLM(CONFIG).cuda().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = {"input_ids": torch.randint(0, 64, (4, 8), device="cuda")}
        loss_of = lambda batch: model(**batch, use_cache=False).logits.float().square().mean((1, 2))  # noqa: E731
    optimizer = ZeroOrderOptimizer(model, "fo-sgd", lr=1e-2)
    losses = []
    optimizer.watch = lambda record: losses.append(record.loss)
    for _ in range(4):
        optimizer.step(loss_of, batch=batch)
    optimizer.land()
    assert optimizer.steps == len(losses) == 4
    assert losses[-1] < losses[0] or why == "dropout"
    assert optimizer.captured.graphs.usable == ("not captured" not in caplog.text)
    assert why == "checkpointing" or not optimizer.captured.graphs.usable
