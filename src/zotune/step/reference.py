"""A step in plain torch, on whole tensors, for any estimator and rule: readable, slow, and what every path is checked against."""

# Q queries, C copies of the batch.

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.methods import Method
from zotune.noise import reference
from zotune.updates import Conservative, Linear

Weights = Mapping[str, Tensor]


def take(
    weights: Weights, loss: Callable[[Weights], float], method: Method, *, step: int, lr: float, eps: float,
    seed: int = 0, direction: str = "gaussian", state: MutableMapping[str, dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The weights after a step, by name. loss: of any weights, on the step's batch. state: a rule's buffers, changed in place."""
    assert method.estimator is not None
    z_Q = [z_of(weights, noise.step_seed(seed, step, q), direction) for q in range(method.queries)]

    def moved(by: Mapping[str, Any], factor: float) -> dict[str, Tensor]:
        return {name: w + factor * by[name] for name, w in weights.items()}

    places = [moved(z_Q[probe.query], probe.sign * eps) for probe in method.estimator.probes]
    losses_C1 = torch.tensor([[loss(at)] for at in places], dtype=torch.float64)
    eps_, lr_ = (torch.tensor(x, dtype=torch.float64) for x in (eps, lr))
    g_Q = method.rule.project(method.estimator.differences(losses_C1), eps_, losses_C1).flatten()
    rule = method.rule
    if not isinstance(rule, Linear):
        mean = {name: torch.stack([g * z[name] for g, z in zip(g_Q, z_Q, strict=True)]).mean(0) for name in weights}
        state = {} if state is None else state
        for name, w in weights.items():
            state.setdefault(name, {buffer: torch.zeros_like(w) for buffer in rule.buffers})
        return {name: rule.move(w.clone(), mean[name], state[name], lr, step + 1) for name, w in weights.items()}
    memory = {} if state is None else state.setdefault("", {"memory": torch.zeros(rule.memory, dtype=torch.float64)})
    coefs, memory["memory"] = rule.recalled(g_Q, lr_, memory.get("memory", torch.zeros(rule.memory)))
    coefs_Q = coefs.tolist()
    update = {name: sum(c * z[name] for c, z in zip(coefs_Q, z_Q, strict=True)) for name in weights}
    if isinstance(rule, Conservative):
        candidates = [moved(update, factor) for factor in (0.0, 1.0, -1.0)]
        return candidates[int(rule.choose(torch.tensor([loss(at) for at in candidates], dtype=torch.float64)))]
    return moved(update, 1.0)


def z_of(weights: Weights, seed: int, direction: str) -> dict[str, Tensor]:
    """z of each tensor, in its dtype: noise of its name and its elements' numbers."""
    draw = reference.DRAW[direction]
    return {
        name: draw(torch.arange(w.numel()), seed, noise.parameter_id(name)).to(w.dtype).view(w.shape)
        for name, w in weights.items()
    }
