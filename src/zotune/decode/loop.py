"""One loop of decode steps over a fixed set of slots: prompts are read into them, each step is a token more of every answer."""

# S slots, n of them, T tokens, V vocabulary.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zotune.decode import Request
from zotune.decode.board import Board
from zotune.decode.cache import SlotCache, Windows
from zotune.decode.seats import SeatReads
from zotune.engines.modules import FusedModules
from zotune.models.kinds import without_adapter


class Loop:
    """Requests answered by so many slots, at weights that stay as they are meanwhile.

    reads: makes the mode under which rows of these members are computed; None: the model's weights as they are.
    fused: the modules for which kernels stand in, beside a mode. learn: look for them in each forward.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: SlotCache,
        windows: Windows,
        board: Board,
        reads: Callable[[Sequence[int]], SeatReads] | None,
        fused: FusedModules,
        learn: bool = False,
    ) -> None:
        self.model, self.cache, self.windows, self.board, self.reads = model, cache, windows, board, reads
        self.fused, self.learn = fused, learn
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.positions = "position_ids" in inspect.signature(without_adapter(model).forward).parameters
        self._members = [-1] * len(board.slots)
        self._mode: SeatReads | None = None
        self._dealt = False

    def prefill(self, slots_n: Tensor, requests: Sequence[Request], multiple: int = 1) -> None:
        """The prompts read, and the first token of each answer. multiple: of tokens, to which they are padded, if there is room.

        Padding is behind a prompt, whose last token sees none of it; what it leaves in a slot is written over before anybody looks.
        """
        device, slots = slots_n.device, self.board.slots
        lengths = [len(request.prompt) for request in requests]
        tokens = max(max(lengths), min(-(-max(lengths) // multiple) * multiple, slots.room))
        ids_nT = torch.full((len(requests), tokens), self.board.settings.pad)
        for row, request in enumerate(requests):
            ids_nT[row, : lengths[row]] = torch.tensor(request.prompt)
        last_n = torch.tensor(lengths, device=device) - 1
        at_nT = torch.arange(tokens, device=device).expand(ids_nT.shape)
        members = [request.member for request in requests]
        mode = None if self.reads is None else self.reads(members)
        slots.reading = slots_n
        try:
            with _last_alone(self.model, last_n) as alone:
                logits_nTV = self._forward(mode, ids_nT.to(device), at_nT, None)
        finally:
            slots.reading = None
        rows_n = torch.arange(len(requests), device=device)
        self.board.write(slots_n, logits_nTV[:, -1] if alone else logits_nTV[rows_n, last_n])
        for slot, member in zip(slots_n.tolist(), members, strict=True):
            self._members[slot] = member
        self._dealt = False

    def steps(self) -> None:
        """As many steps as are taken before the host looks at what came of them."""
        if not self._dealt:
            self._deal()
        slots = self.board.slots
        slots.columns = 1 + int(torch.where(self.board.alive_S, slots.at_S, 0).max())
        self.step()

    def step(self) -> None:
        """The next token of each slot."""
        slots = self.board.slots
        mask = self.windows.mask(slots, self.dtype)
        logits_S1V = self._forward(self._mode, self.board.token_S[:, None], slots.at_S[:, None], mask)
        self.board.write(slots.all_S, logits_S1V[:, -1])

    def keep(self, slots: Sequence[int]) -> None:
        """These slots alone, in this order."""
        self.cache.keep(self.board.keep(slots))
        self._members = [self._members[s] for s in slots]
        self._dealt = False

    def _deal(self) -> None:
        """The slots' members for the steps to come."""
        self._dealt = True
        if self.reads is None:
            return
        if self._mode is None or len(self._mode.parts) != len(self._members):
            self._mode = self.reads(self._members)
        else:
            self._mode.deal(self._members)

    def _forward(self, mode: SeatReads | None, ids_nT: Tensor, at_nT: Tensor, mask: Any) -> Tensor:
        given: dict[str, Any] = {"position_ids": at_nT} if self.positions else {}
        given |= {"input_ids": ids_nT, "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        if mode is None:
            logits: Tensor = self.model(**given).logits
            return logits
        learning = self.fused.learning() if self.learn else nullcontext()
        with mode, learning, self.fused.standing_in(mode):
            logits = self.model(**given).logits
        return logits


@contextmanager
def _last_alone(model: nn.Module, last_n: Tensor) -> Iterator[bool]:
    """The output head sees each row's last hidden state alone, (n, 1, …); whether there is such a head."""
    head: Any = without_adapter(model).get_output_embeddings()
    if head is None:
        yield False
        return
    rows_n = torch.arange(len(last_n), device=last_n.device)
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows_n, last_n][:, None], *args[1:]))
    try:
        yield True
    finally:
        handle.remove()
