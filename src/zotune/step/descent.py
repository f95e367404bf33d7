"""Back-propagation: a loss's gradients, and a step that descends along them as one CUDA graph.

The graph holds forward, backward and update for one shape of batch. Gradients live in its memory, the moments in the optimizer's
state, and the update is a pass of `zotune.updates.fused` over each parameter. Whether the step is skipped is decided on the device.
"""

# G parameter groups, N numbers of a rule.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from zotune.engines.attended import hiding_nothing
from zotune.errors import InputError
from zotune.record.steps import StepRecord
from zotune.step.graphs import MOST_GRAPHS, Flight, Graphs, fill, key_of
from zotune.step.probing import whole
from zotune.updates import Rule
from zotune.updates.rule import NUMBERS, passes_on, table


def slopes(loss: Callable[[Any], Any], batches: Sequence[Any], params: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """The loss over the batches, 0-d, and its gradient by each parameter, None of one that it does not read.

    Raises InputError for a loss without a gradient.
    """
    with torch.enable_grad(), hiding_nothing(params):
        found = whole(loss, batches)
        if not isinstance(found, Tensor) or not found.requires_grad:
            raise InputError(
                "back-propagation needs a closure that returns a tensor with a gradient; this one's has none "
                "(a number, a detached tensor, or parameters with requires_grad=False)"
            )
        found = found.double().mean() if found.dim() else found
        return found.detach(), list(torch.autograd.grad(found, params, allow_unused=True))


def finite(gradients: Sequence[Any]) -> Tensor:
    """0-d bool: whether all are. One pass, and no tensor as large as they."""
    some = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    return torch.isfinite(get_total_norm(some, math.inf))


class DescentGraphs(Graphs):
    """The captured steps of an optimizer whose method is back-propagation. state: the optimizer's; graphs hold its tensors."""

    def __init__(self, rule: Rule, params_G: Sequence[Sequence[Any]], state: MutableMapping[Any, Any]) -> None:
        super().__init__()
        self.rule, self.params_G, self.state = rule, params_G, state
        self._aside: Any = None

    def step(
        self, loss: Callable[[Any], Tensor], batches: Sequence[Mapping[str, Tensor]], record: StepRecord
    ) -> Flight | None:
        """A step that the device takes, or None where it has to be taken without a graph. record: what it finds is filled in."""
        captured = self.of(
            key_of(loss, batches), lambda: _Captured(self, loss, batches), lambda made: self._captured(made, made.device),
            MOST_GRAPHS,
        )  # fmt: skip
        if captured is None:
            return None
        steps_G = captured.steps() if self.rule.counts else [0] * len(self.params_G)
        if steps_G is None:
            return None
        captured.load(batches, table(self.rule.numbers_of(record.lr_G, record.decay_G, steps_G)))
        captured.graph.replay()
        counted = [param for params in captured.read_G for param in params]
        return Flight(captured.found, record, 1, captured.found[0].float(), counted)

    def _first(self, held: Any, device: torch.device) -> None:
        """On a stream of its own: what autograd leaves on the stream at hand, a capture would have to wait for."""
        self._aside = self._aside or torch.cuda.Stream(device)
        self._aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._aside):
            held.run()
        torch.cuda.current_stream(device).wait_stream(self._aside)


class _Captured:
    """A step on batches of certain shapes. read_G: the parameters that its loss reads, by group, once it has run."""

    def __init__(
        self, graphs: DescentGraphs, loss: Callable[[Any], Tensor], batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.graphs, self.loss = graphs, loss
        self.graph: Any = None
        self.batches = [{name: t.clone() for name, t in batch.items()} for batch in batches]
        self.device = device = next(iter(self.batches[0].values())).device
        groups = len(graphs.params_G)
        # one copy to the device a step: the rule's numbers, and whether anything may change yet
        self.sent = torch.zeros(groups * NUMBERS + 1, dtype=torch.float64, device=device)
        self.numbers_GN, self.armed = self.sent[:-1].view(groups, NUMBERS), self.sent[-1]
        # the loss, zeros for projected gradients, whether it goes, no choice
        self.found = torch.zeros(1 + groups + 2, dtype=torch.float64, device=device)
        self.read_G: list[list[Any]] = [[] for _ in range(groups)]

    def steps(self) -> list[int] | None:
        """How many updates the parameters that it reads have had, by group; None where those of one group differ."""
        found_G = [{self.graphs.state[p].get("steps", 0) for p in params} for params in self.read_G]
        return None if any(len(found) > 1 for found in found_G) else [found.pop() if found else 0 for found in found_G]

    def load(self, batches: Sequence[Mapping[str, Tensor]], numbers_GN: Tensor) -> None:
        fill(self.batches, batches)
        self.sent.copy_(torch.cat([numbers_GN.view(-1), numbers_GN.new_ones(1)]), non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        graphs, rule = self.graphs, self.graphs.rule
        loss, gradients = slopes(self.loss, self.batches, [p for params in graphs.params_G for p in params])
        goes = torch.isfinite(loss) & finite(gradients)
        self.found[0].copy_(torch.where(goes, loss, torch.full_like(loss, math.nan)))
        self.found[-2].copy_(goes)
        moves = (goes & (self.armed != 0)).int()
        passes, rest = passes_on({self.device}), iter(gradients)
        for group, params in enumerate(graphs.params_G):
            pairs = [(param, slope) for param in params if (slope := next(rest)) is not None]
            self.read_G[group] = [param for param, _ in pairs]
            rule.reserve(self.read_G[group], graphs.state)  # before it is captured: no graph's own memory
            for param, slope in pairs:
                passes.descend(rule, param, slope, graphs.state[param], self.numbers_GN[group], moves)


def captured_by(rule: Rule, devices: set[torch.device]) -> bool:
    """Whether steps along gradients can be graphs: by a rule that has a pass, unless it descends in a way of its own."""
    return rule.kernel != "" and type(rule).descend is Rule.descend and passes_on(devices) is not None
