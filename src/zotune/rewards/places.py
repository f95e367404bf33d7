"""Rewards at places: an engine whose losses are of what the model writes there."""

# C copies of a batch, B rows, n = C·B answers.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.decode.asking import Answer, Request
from zotune.directions import Displacement, HeldDisplacement
from zotune.engines.places import Places, as_losses

ANSWERS, REQUESTS = "answers", "requests"  # what the batch has beside its prompts when its rewards are asked for
Write = Callable[[Sequence[Request], Sequence[tuple[int, int]], Sequence[float]], list[Answer]]


class WritingEngine:
    """An `Engine` that has the answers written at all places of a step at once, and asks `loss` for a number for each.

    engine: whose directions and writer it is. write: (requests, members, eps by parameter group) → answers. A batch has "prompts",
    and "rows", their numbers in the step; `loss` gets it with "answers" and "requests" beside, copy by copy and within a copy row
    by row, and gives (n,).
    """

    def __init__(self, engine: Any, write: Write) -> None:
        self.engine, self.write = engine, write
        self.name, self.directions, self.scratch = engine.name, engine.directions, engine.scratch
        self.forwards = 0

    @property
    def writer(self) -> Any:
        return self.engine.writer

    def losses(self, loss: Callable[[Any], Any], batch: Mapping[str, Any], places: Places) -> Tensor:
        prompts = batch["prompts"]
        members, requests = asked_of(prompts, places, batch["rows"].tolist())
        assert isinstance(places.at, Displacement)
        answers = self.write(requests, members, [coefs_Q[0] for coefs_Q in places.at.coefs_GQ])
        self.forwards += len(places.copies)
        found = as_losses(loss({**batch, ANSWERS: answers, REQUESTS: requests}))
        if found.numel() != len(requests):
            raise ValueError(
                f"the closure returned {found.numel()} numbers for {len(requests)} answers; return one each"
            )
        return found.view(len(places.copies), len(prompts))

    def overlook(self, loss: Any, batch: Any, places: Places) -> None:
        """Of what others write the update needs nothing."""

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        raise ValueError("a method that compares moves of its own is not for rewards; use es, eggroll or zo-sgd")

    def replayed(self) -> None:
        self.engine.replayed()


def asked_of(
    prompts: Sequence[Any], places: Places, rows: Sequence[int]
) -> tuple[list[tuple[int, int]], list[Request]]:
    """The members (seed, sign) of all places that are displaced, and a request for each row of each place, in the losses' order.

    rows: the prompts' numbers in the step, which what is drawn depends on.
    """
    seeds_Q = places.at.seeds_Q
    members: dict[tuple[int, int], int] = {}
    requests = []
    for place in places.of(len(prompts)):
        own = -1
        if place.sign:
            own = members.setdefault((int(seeds_Q[place.direction]), place.sign), len(members))
        requests += [Request(tuple(prompts[row].ids), rows[row], own) for row in range(place.first, place.last)]
    return list(members), requests


def filled(rewards_CB: Tensor) -> Tensor:
    """Missing rewards (NaN) at the mean of their prompt's others, so that they neither praise nor blame a member; of a prompt that
    got none 0.

    >>> filled(torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")], [3.0, float("nan")]])).tolist()
    [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    """
    mean_B = torch.nanmean(rewards_CB, 0).nan_to_num(0.0)
    return torch.where(rewards_CB.isnan(), mean_B, rewards_CB)


def alike(rewards_CB: Tensor) -> float:
    """The share of prompts whose members all score alike (or have no score): they told nothing."""
    low_B, high_B = rewards_CB.nan_to_num(math.inf).amin(0), rewards_CB.nan_to_num(-math.inf).amax(0)
    return float((low_B >= high_B).double().mean())
