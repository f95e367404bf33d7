"""What each slot has written so far, on the device: a step reads and writes it without the host."""

# S slots, n of them, K tokens of an answer at most, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.decode.asking import Answer, Request, Settings
from zotune.decode.cache import Slots
from zotune.decode.choosing import Draws, choose
from zotune.engines.parts import kernels_for


class Board:
    """The slots' answers. A slot is alive while its answer goes on; others are empty, or wait for the host to read them.

    token_S: what is fed next. count_S: how many tokens are written. limit_S: the most. requests: whose answers they are.
    """

    def __init__(self, slots: Slots, settings: Settings, seen: dict[int | None, list[Tensor]] | None = None) -> None:
        """seen: is given the logits of each request's tokens."""
        count, device = len(slots), slots.at_S.device
        self.slots, self.settings = slots, settings
        self.requests: list[int | None] = [None] * count
        self.token_S = torch.full((count,), settings.pad, dtype=torch.int64, device=device)
        self.start_S, self.count_S, self.limit_S = (torch.zeros_like(self.token_S) for _ in range(3))
        self.alive_S = torch.zeros(count, dtype=torch.bool, device=device)
        self.finished_S, self.finite_S = torch.zeros_like(self.alive_S), torch.ones_like(self.alive_S)
        self.written_SK = torch.zeros(count, settings.max_new_tokens, dtype=torch.int64, device=device)
        self.seeds_SK = torch.zeros_like(self.written_SK)
        self.ends = torch.tensor(settings.ends, dtype=torch.int64, device=device)
        self._noise_SV: Tensor | None = None
        self._draws: dict[int, Draws] = {}  # by rows: a step, or prompts read by a graph, find them where they were
        self.seen = seen

    def seat(
        self,
        slots: Sequence[int],
        numbers: Sequence[int],
        requests: Sequence[Request],
        limits: Sequence[int],
        seeds_nK: Tensor,
    ) -> Tensor:
        """(n,) int64: these slots, in which answers to these requests begin. numbers: of the requests."""
        device = self.token_S.device
        slots_n = torch.tensor(slots, device=device)
        for slot, number in zip(slots, numbers, strict=True):
            self.requests[slot] = number
        self.start_S[slots_n] = torch.tensor([len(request.prompt) for request in requests], device=device)
        self.limit_S[slots_n] = torch.tensor(limits, device=device)
        self.count_S[slots_n] = 0
        self.alive_S[slots_n] = self.finite_S[slots_n] = True
        self.finished_S[slots_n] = False
        if self.settings.temperature:
            self.seeds_SK[slots_n] = seeds_nK
        return slots_n

    def write(self, slots_n: Tensor, logits_nV: Tensor) -> None:
        """The next token of each of these slots."""
        if self.seen is not None:
            for row in self.alive_S[slots_n].nonzero().flatten().tolist():
                self.seen.setdefault(self.requests[slots_n[row]], []).append(logits_nV[row].clone())
        at_n = self.count_S[slots_n].clamp(max=self.written_SK.shape[1] - 1) if self.settings.temperature else None
        gumbel_nV = None if at_n is None else self._gumbel(slots_n, at_n, logits_nV)
        if kernels_for(logits_nV) is not None:
            from zotune.decode.kernels import write

            write(self, slots_n, logits_nV, gumbel_nV)
            return
        alive_n, count_n = self.alive_S[slots_n], self.count_S[slots_n]
        at_n = count_n.clamp(max=self.written_SK.shape[1] - 1)
        self.finite_S[slots_n] &= logits_nV.amax(-1).isfinite() | ~alive_n  # NaN goes through a maximum
        chosen_n = choose(logits_nV, self.settings, gumbel_nV)
        ended_n = alive_n & torch.isin(chosen_n, self.ends)
        going_n = alive_n & ~ended_n
        self.written_SK[slots_n, at_n] = torch.where(going_n, chosen_n, self.written_SK[slots_n, at_n])
        count_n = count_n + going_n
        self.count_S[slots_n] = count_n
        self.finished_S[slots_n] |= ended_n
        on_n = going_n & (count_n < self.limit_S[slots_n])
        self.alive_S[slots_n] = on_n
        self.token_S[slots_n] = chosen_n.masked_fill(~going_n, self.settings.pad)
        # one whose answer has ended reads as little as can be
        self.slots.at_S[slots_n] = torch.where(on_n, self.start_S[slots_n] + count_n - 1, 0)

    def _gumbel(self, slots_n: Tensor, at_n: Tensor, logits_nV: Tensor) -> Tensor:
        rows = len(slots_n)
        if self._noise_SV is None:
            self._noise_SV = torch.empty(len(self.slots), logits_nV.shape[1], device=logits_nV.device)
        if rows not in self._draws:
            self._draws[rows] = Draws(self._noise_SV[:rows])
        return self._draws[rows].draw(self.seeds_SK[slots_n, at_n])

    def read(self, alive: Sequence[bool]) -> dict[int, Answer]:
        """The answers, by request, of slots that are no longer alive; these are empty then."""
        done = [s for s, request in enumerate(self.requests) if request is not None and not alive[s]]
        if not done:
            return {}
        slots_n = torch.tensor(done, device=self.token_S.device)
        counts, finished, finite, written = (
            t[slots_n].tolist() for t in (self.count_S, self.finished_S, self.finite_S, self.written_SK)
        )
        found = {}
        for i, slot in enumerate(done):
            number = self.requests[slot]
            assert number is not None
            found[number] = Answer(tuple(written[i][: counts[i]]), finished[i], finite[i])
            self.requests[slot] = None
        return found

    def clear(self) -> None:
        """All slots are empty."""
        self.requests = [None] * len(self.slots)
        self.alive_S.zero_()

    def take(self, other: Board, slots: Sequence[int]) -> Tensor:
        """(n,) int64: another's slots, which are the first of this one, and the others empty."""
        self.clear()
        slots_n = torch.tensor(slots, device=self.token_S.device)
        for name, value in vars(self).items():
            if name.endswith(("_S", "_SK")):
                value[: len(slots)] = getattr(other, name)[slots_n]
        self.slots.at_S[: len(slots)] = other.slots.at_S[slots_n]
        self.requests[: len(slots)] = [other.requests[s] for s in slots]
        self.seen = other.seen
        return slots_n
