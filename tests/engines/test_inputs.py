"""Directions along what linear maps are given, by a basis that is kept (zo-act) or follows them (aim-zo): on whole tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build
from test_graphs import pretend
from test_own_inputs import SEED, batch_of, maps_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import signed
from zotune.noise import reference
from zotune.record.trajectory import Record
from zotune.tasks.scoring import answer_losses

LR, EPS = {"zo-act": 1e-2, "aim-zo": 1e-3}, 1e-2
Tensors = dict[str, torch.Tensor]


def loss_at(model: nn.Module, batch: Tensors, move: Tensors, by: float) -> float:
    moved = copy.deepcopy(model)
    own = dict(moved.named_parameters())
    with torch.no_grad():
        for name, z in move.items():
            own[name].add_(by * z)
        return float(answer_losses(moved, batch).mean())


def inputs_of(model: nn.Module, batch: Tensors) -> Tensors:
    """(n, D) of each map: all tokens that the attention mask counts."""
    seen: Tensors = {}
    counted = batch["attention_mask"].bool().flatten()

    def keep(name: str):
        return lambda module, args: seen.update({name: args[0].reshape(-1, args[0].shape[-1])[counted]})

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in maps_of(model).items()]
    with torch.no_grad():
        answer_losses(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def normals(count: int, name: str, seed: int) -> torch.Tensor:
    return reference.normals(torch.arange(count), signed(seed), noise.parameter_id(name)).double()


def masked(seed: int, rows: int = 4) -> Tensors:
    batch = batch_of(rows, seed=seed)
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    return batch


def laid(module: nn.Module, out: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """out·intoᵀ as the map's weight lies: Conv1D's is (D, O)."""
    return into @ out.mT if isinstance(module, Conv1D) else out @ into.mT


class ByHand:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.maps = model, maps_of(model)
        self.basis: Tensors = {}
        self.m: Tensors = {}
        self.v: Tensors = {}

    def outputs(self, name: str) -> int:
        return dict(self.model.named_parameters())[name].shape[1 if isinstance(self.maps[name], Conv1D) else 0]

    def sides(self, name: str) -> tuple[str, str]:
        """The noise of what the map gives, and of what it takes."""
        return (f"{name}.V", f"{name}.U") if isinstance(self.maps[name], Conv1D) else (f"{name}.U", f"{name}.V")

    def descend(self, moves: Tensors, lr: float) -> None:
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, move in moves.items():
                own[name] -= lr * move

    def zo_act(self, batch: Tensors, step: int) -> None:
        if step == 0:
            for name, h in inputs_of(self.model, batch).items():
                v = torch.linalg.eigh(h.T @ h).eigenvectors[:, -2:].flip(1)  # the two largest, largest first
                self.basis[name] = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
        seed = noise.step_seed(SEED, step, 0)
        u = {n: normals(self.outputs(n) * 2, self.sides(n)[0], seed).view(-1, 2) for n in self.maps}
        z = {n: laid(self.maps[n], u[n], self.basis[n]) for n in self.maps}
        g = (loss_at(self.model, batch, z, EPS) - loss_at(self.model, batch, z, -EPS)) / (2 * EPS)
        moves = {}
        for n in self.maps:
            self.m[n] = 0.9 * self.m.get(n, 0) + 0.1 * g * u[n]
            self.v[n] = 0.999 * self.v.get(n, 0) + 0.001 * (g * u[n]) ** 2
            m, v = self.m[n] / (1 - 0.9 ** (step + 1)), self.v[n] / (1 - 0.999 ** (step + 1))
            moves[n] = laid(self.maps[n], m / (v.sqrt() + 1e-8), self.basis[n])
        self.descend(moves, LR["zo-act"])

    def aim_zo(self, batch: Tensors, step: int, queries: int = 3) -> None:
        for name, h in inputs_of(self.model, batch).items():
            if step == 0:
                wide = min(128, h.shape[1])
                start = normals(h.shape[1] * wide, self.sides(name)[1], noise.step_seed(SEED, 0, 2**32 - 1))
                self.basis[name] = self.qf(start.view(-1, wide))
            q = self.basis[name]
            self.basis[name] = self.qf(q + 0.3 / len(h) * h.T @ (h @ q))
        places, zs = [], []
        for query in range(queries):
            seed, z = noise.step_seed(SEED, step, query), {}
            for n, module in self.maps.items():
                q = self.active(self.basis[n], step)
                a, b = (
                    normals(k, i, seed)[:, None]
                    for k, i in zip((self.outputs(n), q.shape[1]), self.sides(n), strict=True)
                )
                z[n] = laid(module, a, q @ b)
                z[n] = z[n] / z[n].norm() * z[n].numel() ** 0.5
            zs.append(z)
            places.append(loss_at(self.model, batch, z, EPS))
        mean = sum(places) / queries
        g = [queries / (queries - 1) * (loss - mean) / EPS for loss in places]
        self.descend({n: sum(x * z[n] for x, z in zip(g, zs, strict=True)) / queries for n in self.maps}, LR["aim-zo"])

    @staticmethod
    def qf(columns: torch.Tensor) -> torch.Tensor:
        q, r = torch.linalg.qr(columns)
        return q @ r.diagonal().sign().diag()

    @staticmethod
    def active(q: torch.Tensor, step: int) -> torch.Tensor:
        """The first 48 columns, and 16 of the others in their order, those whose draws are least."""
        rest = q.shape[1] - min(48, q.shape[1])
        draws = reference.normals(torch.arange(rest), signed(noise.step_seed(SEED, step, 2**32 - 1)), 0)
        chosen = 48 + draws.argsort(stable=True)[: min(64, q.shape[1]) - 48].sort().values if rest else torch.arange(0)
        return torch.cat([q[:, :48], q[:, chosen]], 1)


def optimizer_of(model: nn.Module, method: str, **more) -> ZeroOrderOptimizer:
    own = {"zo-act": {"rank": 2}, "aim-zo": {"queries": 3}}[method]
    return ZeroOrderOptimizer(model, method, lr=LR[method], eps=EPS, seed=SEED, **own | more)


@pytest.mark.parametrize("method", ["zo-act", "aim-zo"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_its_formula(name, method):
    model = build(name).double()
    start, hand = copy.deepcopy(model), ByHand(copy.deepcopy(model))
    optimizer = optimizer_of(model, method)
    for step in range(3):
        batch = masked(step, (4, 4, 2)[step])
        optimizer.step(lambda batch: answer_losses(model, batch), batch=batch)
        (hand.zo_act if method == "zo-act" else hand.aim_zo)(batch, step)
    assert optimizer.engine.usable, optimizer.engine.why
    wanted, begun = dict(hand.model.named_parameters()), dict(start.named_parameters())
    for n, p in model.named_parameters():
        # g, lr and the bases are float32, and backends agree on normals to 1e-6: what that changes of a small one, Adam enlarges
        torch.testing.assert_close(p.data, wanted[n].data, rtol=0, atol=2e-5 if method == "zo-act" else 3e-6)
        assert torch.equal(p, begun[n]) == (n not in hand.maps)
    assert optimizer.forward_passes == {"zo-act": 3 * 2 + 1, "aim-zo": 3 * 4}[method]


def test_the_active_columns_of_a_wide_map_are_the_first_48_and_16_of_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 7)).double()
    hand, x = ByHand(copy.deepcopy(model)), torch.randn(9, 150, dtype=torch.float64)
    optimizer = optimizer_of(model, "aim-zo")
    for _ in range(2):
        optimizer.step(lambda batch: model(batch["x"]).square().mean(1), batch={"x": x})
    tracked, (weight, _) = optimizer.engine.factored, model.parameters()
    basis = optimizer.state[weight]["basis"]
    active = tracked.active[id(weight)]
    assert (basis.shape, active.shape) == ((150, 128), (150, 64))
    torch.testing.assert_close(active, hand.active(basis.double(), 1))
    torch.testing.assert_close(active.T @ active, torch.eye(64).double(), rtol=0, atol=1e-6)
    u, v = (t[:, :, 0] for t in tracked.drawn(SimpleAt((5, 6))).of[id(weight)])
    torch.testing.assert_close((u.norm(dim=1) * v.norm(dim=1)) ** 2, torch.full((2,), 150.0 * 7).double())


class SimpleAt:
    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.seeds_Q = seeds

    def on(self, group, device):
        return torch.tensor(self.seeds_Q), torch.ones(len(self.seeds_Q))


@pytest.mark.parametrize("method", ["zo-act", "aim-zo"])
def test_a_cut_and_resumed_run_is_a_whole_one_and_its_record_is_refused(method):
    ends = []
    for cut in (False, True):
        model = build("llama")
        loss = lambda batch, model=model: answer_losses(model, batch)  # noqa: E731
        optimizer = optimizer_of(model, method)
        for step in range(4):
            if cut and step == 2:
                kept = copy.deepcopy(optimizer.state_dict())
                optimizer = optimizer_of(model, method)
                optimizer.load_state_dict(kept)
            optimizer.step(loss, batch=masked(step))
        ends.append(model)
        assert optimizer.forward_passes == {"zo-act": 4 * 2 + 1, "aim-zo": 4 * 4}[method]
    for p, q in zip(*(model.parameters() for model in ends), strict=True):
        assert torch.equal(p, q)
    taken = optimizer.last
    record = Record(taken.step + 1, 0.0, 0.0, taken.g_GQ[0], taken.lr_G, taken.decay_G)
    with pytest.raises(ValueError, match="function of its rows"):
        optimizer.apply_record(record)


@pytest.mark.parametrize("method", ["zo-act", "aim-zo"])
def test_a_captured_step_gives_the_weights_of_one_without(method, monkeypatch):
    """On the CPU: what a graph would hold, run as plain functions."""
    ends = []
    for wanted in (False, True):
        if wanted:
            pretend(monkeypatch)
        model = build("llama")
        optimizer = optimizer_of(model, method)
        optimizer.captured.wanted = wanted
        loss = lambda batch, model=model: answer_losses(model, batch)  # noqa: E731
        for step in range(3):
            optimizer.step(loss, batch=masked(step))
        optimizer.land()
        assert (optimizer.captured.graphs is not None) == wanted
        ends.append(model)
    for p, q in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert not all(torch.equal(p, q) for p, q in zip(build("llama").parameters(), ends[0].parameters(), strict=True))
