"""Every registered method against its formula, written down on whole tensors in float64: a method without a row here fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import signed
from zotune.methods import METHODS, Method, make_method
from zotune.noise import reference
from zotune.step import reference as plain_step

LR, EPS, SEED, STEPS = 3e-3, 1e-3, 5, 3
Tensors = dict[str, torch.Tensor]


class Toy(nn.Module):
    """Two matrices of unlike shapes, one stored transposed, a vector, and a loss with curvature."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(5, 7, generator=draw, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(7, 4, generator=draw, dtype=torch.float64).t())
        self.c = nn.Parameter(torch.randn(7, generator=draw, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        x = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
        return torch.tanh((x @ self.a + self.c) @ self.b.t()).square().sum() + self.b.sin().sum()


class Hand:
    """A model's weights by name, its directions, and its loss at any place."""

    def __init__(self, direction: str) -> None:
        self.model, self.direction = Toy(), direction
        self.w: Tensors = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.m = {name: torch.zeros_like(w) for name, w in self.w.items()}
        self.v = copy.deepcopy(self.m)
        self.number = 0.0

    def loss(self, weights: Tensors) -> float:
        return float(torch.func.functional_call(self.model, weights, ()).detach())

    def gradient(self) -> Tensors:
        w = {name: value.clone().requires_grad_() for name, value in self.w.items()}
        found = torch.autograd.grad(torch.func.functional_call(self.model, w, ()), list(w.values()))
        return dict(zip(w, found, strict=True))

    def z(self, step: int, q: int) -> Tensors:
        seed, draw = noise.step_seed(SEED, step, q), reference.DRAW[self.direction]
        return {
            name: draw(torch.arange(w.numel()), signed(seed), noise.parameter_id(name)).double().view(w.shape)
            for name, w in self.w.items()
        }

    def at(self, z: Tensors, by: float) -> float:
        return self.loss({name: w + by * z[name] for name, w in self.w.items()})

    def two_sided(self, step: int, queries: int) -> Tensors:
        """ĝ = (1/Q) Σ (L(θ + εz) − L(θ − εz))/2ε·z."""
        zs = [self.z(step, q) for q in range(queries)]
        g = [(self.at(z, EPS) - self.at(z, -EPS)) / (2 * EPS) for z in zs]
        return self.mean(g, zs)

    def mean(self, g: list[float], zs: list[Tensors]) -> Tensors:
        return {name: sum(x * z[name] for x, z in zip(g, zs, strict=True)) / len(zs) for name in self.w}

    def descend(self, by: Tensors) -> None:
        self.w = {name: w - LR * by[name] for name, w in self.w.items()}

    def adam(self, g: Tensors, step: int) -> None:
        for n in self.w:
            self.m[n] = 0.9 * self.m[n] + 0.1 * g[n]
            self.v[n] = 0.999 * self.v[n] + 0.001 * g[n] ** 2
        m_hat = {n: m / (1 - 0.9 ** (step + 1)) for n, m in self.m.items()}
        v_hat = {n: v / (1 - 0.999 ** (step + 1)) for n, v in self.v.items()}
        self.descend({n: m_hat[n] / (v_hat[n].sqrt() + 1e-8) for n in self.w})


@dataclass
class Inside:
    """A step in a subspace: z = P·u·Qᵀ of the matrices, rank 2, and ĝ of their cores u; a vector is its own core."""

    of: Hand
    left: str | None
    right: str | None
    turn: int

    def basis(self, kind: str, side: int, name: str) -> torch.Tensor:
        seed = signed(noise.step_seed(SEED, self.turn, 2**32 - 1))
        normal = reference.normals(torch.arange(2 * side), seed, noise.parameter_id(name)).double().view(side, 2)
        if kind == "normal":
            return normal
        q, r = torch.linalg.qr(normal)
        return q @ r.diagonal().sign().diag()

    @property
    def bases(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """P and Q, identities where there is none."""
        found = {}
        for name, w in self.of.w.items():
            rows, columns = (*w.shape, 1)[:2]
            p, q = torch.eye(rows).double(), torch.eye(columns).double()
            if w.dim() > 1:
                p = self.basis(self.left, rows, f"{name}.U") if self.left else p
                q = self.basis(self.right, columns, f"{name}.V") if self.right else q
            found[name] = p, q
        return found

    def cores(self, step: int, q: int) -> Tensors:
        seed, found = signed(noise.step_seed(SEED, step, q)), {}
        for name, (p, q_) in self.bases.items():
            size, vector = p.shape[1] * q_.shape[1], self.of.w[name].dim() < 2
            of = name if vector else f"{name}.U" if self.right else f"{name}.V"
            z = reference.normals(torch.arange(size), seed, noise.parameter_id(of)).double()
            found[name] = z.view(-1, 1) if vector else z.view(-1, 2) if self.right else z.view(-1, 2).t()
        return found

    def whole(self, cores: Tensors) -> Tensors:
        return {n: (p @ cores[n] @ q.t()).view(self.of.w[n].shape) for n, (p, q) in self.bases.items()}

    def estimate(self, step: int, queries: int, two_sided: bool = False) -> Tensors:
        cores = [self.cores(step, q) for q in range(queries)]
        places, here = [self.whole(core) for core in cores], self.of.loss(self.of.w)
        if two_sided:
            g = [(self.of.at(z, EPS) - self.of.at(z, -EPS)) / (2 * EPS) for z in places]
        else:
            g = [(self.of.at(z, EPS) - here) / EPS for z in places]
        return self.of.mean(g, cores)


def copes(of: Hand, step: int, queries: int) -> None:
    """Four sets of the elements; each direction perturbs its own at σ·√4, and moves it by the mean over those of the set."""
    words = {n: mask_words(w.numel(), n).view(w.shape) for n, w in of.w.items()}
    sets = {n: word * 4 // 2**32 for n, word in words.items()}
    eps_q, losses = [], []
    for q in range(queries):
        seed = signed(noise.step_seed(SEED, step, q) // 256 * 256 + q % 4)
        z = {
            n: reference.normals(torch.arange(w.numel()), seed, noise.parameter_id(n)).double().view(w.shape)
            * (sets[n] == q % 4)
            for n, w in of.w.items()
        }
        eps_q.append(z)
        losses.append(of.at(z, 2 * EPS))
    scores = torch.tensor(losses, dtype=torch.float64)
    scores = ((scores - scores.mean()) / scores.std(correction=0)).tolist()
    own = [[q for q in range(queries) if q % 4 == k] for k in range(4)]
    for members in own:
        of.descend(of.mean([scores[q] for q in members], [eps_q[q] for q in members]))


def mask_words(count: int, name: str) -> torch.Tensor:
    index, seed = torch.arange(count), signed(noise.step_seed(SEED, 0, 255))
    words = reference.words(index // 4, seed, noise.parameter_id(name), noise.Stream.MASK)
    return words.gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)


def lozo_m(of: Hand, step: int, queries: int, every: int = 50) -> None:
    inside, g = Inside(of, None, "normal", step // every), None
    g = inside.estimate(step, queries, two_sided=True)
    for n, (_, q) in inside.bases.items():
        if step == 0:
            of.m[n] = g[n]
            continue
        if step % every == 0 and of.w[n].dim() > 1:
            before = Inside(of, None, "normal", step // every - 1).bases[n][1]
            of.m[n] = of.m[n] @ before.t() @ q / len(q)
        of.m[n] = 0.9 * of.m[n] + 0.1 * g[n]
    rank = {n: 2 if w.dim() > 1 else 1 for n, w in of.w.items()}
    of.descend({n: move / rank[n] for n, move in inside.whole(of.m).items()})


def zo_muon(of: Hand, step: int, queries: int, every: int = 100) -> None:
    inside = Inside(of, "orthonormal", None, step // every)
    g = inside.estimate(step, queries)
    for n in g:
        if of.w[n].dim() < 2:
            g[n] = 1e-5 * g[n]
            continue
        u, s, v = torch.linalg.svd(g[n] / (g[n].norm() + 1e-7), full_matrices=False)
        for _ in range(5):  # on the singular values alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        g[n] = u @ s.diag() @ v
    of.descend(inside.whole(g))


def subzero_plus(of: Hand, step: int, queries: int) -> None:
    inside = Inside(of, "orthonormal", "orthonormal", 0)
    g, moves = inside.estimate(step, queries), {}
    for n, x in g.items():
        of.m[n] = 0.9 * (of.m[n] if step else 0) + 0.1 * x
        of.v[n] = 0.999 * (of.v[n] if step else 0) + 0.001 * x**2
        m, v = of.m[n] / (1 - 0.9 ** (step + 1)), of.v[n] / (1 - 0.999 ** (step + 1))
        moves[n] = m / (v.sqrt() + 1e-8)
    of.descend(inside.whole(moves))


def zo_sgd_mmt(of: Hand, step: int, queries: int) -> None:
    g = of.two_sided(step, queries)
    of.m = {n: 0.9 * m + g[n] for n, m in of.m.items()}
    of.descend(of.m)


def zo_sgd_cons(of: Hand, step: int, queries: int) -> None:
    g = of.two_sided(step, queries)
    best = min((0.0, -LR, LR), key=lambda by: of.at(g, by))
    of.w = {n: w + best * g[n] for n, w in of.w.items()}


def forward_grad(of: Hand, step: int, queries: int) -> None:
    true, zs = of.gradient(), [of.z(step, q) for q in range(queries)]
    of.descend(of.mean([sum(float((true[n] * z[n]).sum()) for n in true) for z in zs], zs))


def leave_one_out(of: Hand, step: int, queries: int) -> None:
    zs = [of.z(step, q) for q in range(queries)]
    losses = [of.at(z, EPS) for z in zs]
    mean = sum(losses) / queries
    of.descend(of.mean([queries / (queries - 1) * (loss - mean) / EPS for loss in losses], zs))


def fzoo(of: Hand, step: int, queries: int) -> None:
    zs, here = [of.z(step, q) for q in range(queries)], of.loss(of.w)
    losses = torch.tensor([of.at(z, EPS) for z in zs], dtype=torch.float64)
    of.descend(of.mean(((losses - here) / losses.std(correction=0)).tolist(), zs))


def es(of: Hand, step: int, queries: int) -> None:
    """θ ← θ + lr/N·Σ zscore(R)_i·z_i with R = −L, as the paper writes it."""
    zs = [of.z(step, q) for q in range(queries)]
    rewards = -torch.tensor([of.at(z, EPS) for z in zs], dtype=torch.float64)
    score = (rewards - rewards.mean()) / rewards.std(correction=0)
    of.descend(of.mean((-score).tolist(), zs))


def meazo(of: Hand, step: int, queries: int) -> None:
    zs = [of.z(step, q) for q in range(queries)]
    g = [(of.at(z, EPS) - of.at(z, -EPS)) / (2 * EPS) for z in zs]
    of.number = 0.999 * of.number + 0.001 * (sum(g) / queries) ** 2
    size = (of.number / (1 - 0.999 ** (step + 1))) ** 0.5
    of.descend(of.mean([x / (size + 1e-8) for x in g], zs))


# method → what a step is, given the step's number and its directions
FORMULAS: dict[str, Callable[[Hand, int, int], None]] = {
    "zo-sgd": lambda of, step, q: of.descend(of.two_sided(step, q)),
    "zo-sgd-mmt": zo_sgd_mmt,
    "zo-sgd-sign": lambda of, step, q: of.descend({n: g.sign() for n, g in of.two_sided(step, q).items()}),
    "zo-sgd-cons": zo_sgd_cons,
    "zo-adam": lambda of, step, q: of.adam(of.two_sided(step, q), step),
    "forward-grad": forward_grad,
    "fo-sgd": lambda of, step, q: of.descend(of.gradient()),
    "fo-adam": lambda of, step, q: of.adam(of.gradient(), step),
    "leave-one-out": leave_one_out,
    "fzoo": fzoo,
    "es": es,
    "eggroll": leave_one_out,
    "meazo": meazo,
    "copes": copes,
    "lozo-m": lozo_m,
    "zo-muon": zo_muon,
    "subzero-plus": subzero_plus,
}
# rows, or what they give linear maps, which this toy has not: formulas in tests/engines (own_inputs, inputs, flipout)
OF_ROWS = {"own-inputs", "zo-act", "aim-zo", "grzo"}
OWN = {
    "leave-one-out": {"queries": 16},
    "fzoo": {"queries": 8, "direction": "rademacher", "lr": 5e-5, "eps": 1e-4},
    "es": {"queries": 30, "lr": 5e-4},
    "eggroll": {"queries": 30},
    "meazo": {"lr": 1e-4},
    "grzo": {"groups": "batch"},
    "copes": {"queries": 32, "lr": 5e-4},
    "lozo-m": {"rank": 2},
    "zo-muon": {"queries": 4, "lr": 1e-2, "rank": 64},
    "subzero-plus": {"queries": 99, "lr": 2e-2, "rank": 16},
    "zo-act": {"lr": 1e-3},
    "aim-zo": {"queries": 15, "lr": 1e-3, "eps": 8e-5},
    "own-inputs": {"queries": 16, "lr": 2e-3, "eps": 1e-2, "groups": "batch"},
}
COUNTS = [1, 3]


def options_of(name: str, queries: int) -> dict[str, Any]:
    if "queries" not in METHODS[name].options:
        return {}
    return {"queries": max(queries, 2) if make_method(name).signs.count(1) == len(make_method(name).signs) else queries}


def test_every_registered_method_has_its_formula():
    assert set(FORMULAS) == set(METHODS) - OF_ROWS


@pytest.mark.parametrize("queries", COUNTS)
@pytest.mark.parametrize("name", list(FORMULAS))
def test_a_method_is_its_formula(name, queries):
    given = options_of(name, queries)
    if name == "copes" or (name == "fzoo" and queries == 1):
        given = {}  # one loss has no spread, four sets as many directions each: the preset's number
    count = given.get("queries", METHODS[name].queries)
    given |= {"rank": 2} if make_method(name).subspace else {}
    model, hand = Toy(), Hand(make_method(name).direction or "gaussian")
    optimizer = ZeroOrderOptimizer(model, name, lr=LR, eps=EPS, seed=SEED, **given)
    for step in range(STEPS):
        optimizer.step(model)
        FORMULAS[name](hand, step, count)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.data, hand.w[n], rtol=0, atol=1e-6)  # g, lr and z are float32
    assert (model.a - Toy().a).abs().max() > 1e-4


PLAIN = [  # the methods whose directions are dense, which is all that the reference knows
    name for name in FORMULAS if (made := make_method(name)).estimator and not made.subspace and made.sets == 1
]


@pytest.mark.parametrize("name", PLAIN)
def test_the_reference_step_is_the_optimizers(name):
    """The one in plain torch, which every path is checked against, for the method as it comes."""
    method, model = make_method(name), Toy()
    optimizer = ZeroOrderOptimizer(model, name, lr=LR, eps=EPS, seed=SEED)
    weights, state = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    loss = Hand("gaussian").loss
    for step in range(STEPS):
        optimizer.step(model)
        weights = plain_step.take(
            weights, loss, method, step=step, lr=LR, eps=EPS, seed=SEED,
            direction=method.direction or "gaussian", state=state,
        )  # fmt: skip
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.data, weights[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "formula", "every"), [("lozo-m", lozo_m, 2), ("zo-muon", zo_muon, 2), ("lozo-m", lozo_m, 1)]
)
def test_a_subspace_that_turns_takes_what_is_remembered_along(name, formula, every):
    method = make_method(name, queries=3)
    method = replace(method, subspace=replace(method.subspace, every=every), rank=2)
    model, hand = Toy(), Hand("gaussian")
    optimizer = ZeroOrderOptimizer(model, method, lr=LR, eps=EPS, seed=SEED)
    for step in range(5):
        if step in (2, 3):  # resumed where it turns, and where it does not
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = ZeroOrderOptimizer(model, method, lr=LR, eps=EPS, seed=SEED)
            optimizer.load_state_dict(state)
        optimizer.step(model)
        formula(hand, step, 3, every)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.data, hand.w[n], rtol=0, atol=1e-6)
    assert (model.a - Toy().a).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(METHODS))
def test_a_preset_brings_its_own_defaults(name):
    own = OWN.get(name, {})
    optimizer = ZeroOrderOptimizer(Toy(), name)
    assert optimizer.method.queries == own.get("queries", int(not optimizer.method.first_order))
    assert optimizer.direction == own.get("direction", "gaussian")
    assert (optimizer.groups, optimizer.rank) == (own.get("groups", 1), own.get("rank", 1))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"]) == (own.get("lr", 1e-6), own.get("eps", 1e-3))
    said = ZeroOrderOptimizer(Toy(), name, lr=1.0, eps=0.5, direction="gaussian")
    assert (said.param_groups[0]["lr"], said.param_groups[0]["eps"], said.direction) == (1.0, 0.5, "gaussian")


@pytest.mark.parametrize("method", ["fzoo", "copes", Method(None)])
def test_a_step_whose_places_are_all_alike_changes_nothing_and_is_said_to_have_told_nothing(method):
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    optimizer = ZeroOrderOptimizer(model, method, lr=1.0)
    if isinstance(method, Method):
        optimizer.step(lambda: 0.0 * model())
    else:
        optimizer.step(lambda: 0.1)
    assert optimizer.last.told_nothing
    assert optimizer.skipped_steps == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
