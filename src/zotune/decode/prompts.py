"""Prompts read into their slots, and the first token of each answer.

Padding is behind a prompt, whose last token sees none of it; what it leaves in a slot is written over before anybody looks.
"""

# S slots, n of them, T tokens of a prompt, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.decode.asking import Request
from zotune.decode.board import Board
from zotune.decode.cache import Slots
from zotune.decode.seats import SeatReads

# (the members' reads, ids (n, T), their positions (n, T), each row's last one (n,)) → logits (n, V) behind that
LastLogits = Callable[[SeatReads | None, Tensor, Tensor, Tensor], Tensor]


class Prompts:
    """So many prompts of so many tokens at a time. What a reading looks at stays in its place, where a graph of one finds it.

    mode: by which the rows see their members' weights; None: all see the model's as they are.
    """

    def __init__(
        self, slots: Slots, board: Board, mode: SeatReads | None, shape: tuple[int, int], logits: LastLogits
    ) -> None:
        self.slots, self.board, self.mode, self.logits = slots, board, mode, logits
        self.ids_nT = torch.zeros(shape, dtype=torch.int64, device=slots.at_S.device)
        self.slots_n, self.last_n = (torch.zeros_like(self.ids_nT[:, 0]) for _ in range(2))
        self.graph: Any = None
        self.warm = False  # has been read once

    def load(self, slots_n: Tensor, requests: Sequence[Request]) -> None:
        pad, tokens = (self.board.settings.pad,), self.ids_nT.shape[1]
        self.ids_nT.copy_(torch.tensor([[*r.prompt, *pad * (tokens - len(r.prompt))] for r in requests]))
        self.last_n.copy_(torch.tensor([len(r.prompt) - 1 for r in requests]))
        self.slots_n.copy_(slots_n)
        if self.mode is not None:
            self.mode.deal([r.member for r in requests])

    def read(self) -> None:
        """By the device alone."""
        # a table of positions may have no more than the prompt's
        at_nT = torch.arange(self.ids_nT.shape[1], device=self.ids_nT.device).minimum(self.last_n[:, None])
        self.slots.reading = self.slots_n
        try:
            logits_nV = self.logits(self.mode, self.ids_nT, at_nT, self.last_n)
        finally:
            self.slots.reading = None
        self.board.write(self.slots_n, logits_nV)
