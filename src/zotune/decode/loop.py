"""One loop of decode steps over a fixed set of slots: prompts are read into them, each step is a token more of every answer."""

# S slots, n of them, T tokens, V vocabulary.

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.decode.asking import Request, Settings
from zotune.decode.attending import Attention, NotServed
from zotune.decode.board import Board
from zotune.decode.cache import SlotCache, Slots, Windows
from zotune.decode.prompts import Prompts
from zotune.decode.seats import MemberWeights, SeatReads
from zotune.engines.causal import as_without_capture
from zotune.engines.modules import FusedModules
from zotune.engines.parts import kernels_for
from zotune.models.kinds import without_adapter
from zotune.step.graphs import capture

logger = logging.getLogger(__name__)


SHAPES = 32  # of prompts, that are kept
LOOK = 8  # steps by graphs before the host looks at what came of them, and waits for it


class Loop:
    """Requests answered by so many slots, at weights that stay as they are meanwhile.

    weights: the members', drawn; None: all slots read the model's as they are. room: columns, of the longest prompt and its answer.
    On CUDA a step is captured as a graph once one has been taken without. Whatever it reads stays in its place, so that a loop
    serves later requests too, after `clear`.
    """

    def __init__(
        self,
        reader: Reader,
        slots: int,
        room: int,
        settings: Settings,
        weights: MemberWeights | None,
    ) -> None:
        self.reader, self.weights = reader, weights
        self.slots = Slots(slots, room, reader.device)
        self.board = Board(self.slots, settings)
        self.cache = SlotCache(reader.windows.of_layers, self.slots)
        self._members = [-1] * slots
        self._mode = None if weights is None else weights.reads(self._members)
        self._dealt = True
        self._graph: Any = None
        self._warm = False  # a step has been taken
        self._prompts: dict[tuple[int, int], Prompts] = {}  # by rows and tokens

    def clear(self, seen: dict[int | None, list[Tensor]] | None = None) -> None:
        """Nobody's answers, and the members' weights as they are drawn now. seen: is given the logits of each request's tokens."""
        self.board.clear()
        self.board.seen = seen
        self._members = [-1] * len(self.slots)
        self._dealt = False

    def prefill(self, slots_n: Tensor, requests: Sequence[Request], tokens: int) -> None:
        """The prompts read, each padded to so many tokens, and the first token of each answer.

        On CUDA prompts of one shape are read by a graph from the second time on.
        """
        prompts = self._prompts_of(len(requests), tokens)
        prompts.load(slots_n, requests)
        by_graph = self.reader.graphs and prompts.warm and self.board.seen is None
        if by_graph and prompts.graph is None:
            with as_without_capture():
                prompts.graph = self.reader.captured(prompts.read, "prompts")
        if by_graph and prompts.graph is not None:
            prompts.graph.replay()
        else:
            prompts.read()
            prompts.warm = not self.reader.learns
        for slot, request in zip(slots_n.tolist(), requests, strict=True):
            self._members[slot] = request.member
        self._dealt = False

    def _prompts_of(self, rows: int, tokens: int) -> Prompts:
        prompts = self._prompts.pop((rows, tokens), None)
        if prompts is None:
            # a step's seats are dealt anew behind each reading, so their rows' memory serves here too
            mode = self.weights.reads([-1] * rows, self._mode) if self.weights is not None else None
            logits = partial(self.reader.last_logits, self.cache)
            prompts = Prompts(self.slots, self.board, mode, (rows, tokens), logits)
        self._prompts[rows, tokens] = prompts
        while len(self._prompts) > SHAPES:
            del self._prompts[next(iter(self._prompts))]
        return prompts

    def steps(self) -> None:
        """As many steps as are taken before the host looks at what came of them."""
        if not self._dealt and self._mode is not None:
            self._mode.deal(self._members)
        self._dealt = True
        if self.reader.graphs:
            for _ in range(LOOK):
                self._next()
        else:
            self.slots.columns = 1 + int(torch.where(self.board.alive_S, self.slots.at_S, 0).max())
            self._step()

    def take(self, other: Loop, slots: Sequence[int]) -> None:
        """Another's slots, which go on in the first of this one."""
        self.cache.take(other.cache, self.board.take(other.board, slots))
        self._members = [other._members[s] for s in slots] + [-1] * (len(self.slots) - len(slots))
        self._dealt = False

    def _next(self) -> None:
        """A step, by the graph of one from the second on."""
        if self._warm and self._graph is None and self.board.seen is None:
            self._graph = self.reader.captured(self._step, "steps")
        if self._graph is None:
            known = self.reader.attention.serves is not None  # else the step after is another one
            self._step()
            self._warm = known
        else:
            self._graph.replay()

    def _step(self) -> None:
        """The next token of each slot."""
        self.board.write(self.slots.all_S, self._logits()[:, -1])

    def _logits(self) -> Tensor:
        """(S, 1, V)"""
        reader, attention, slots = self.reader, self.reader.attention, self.slots
        step = (self._mode, self.cache, self.board.token_S[:, None], slots.at_S[:, None])
        try:
            if attention.serves:
                with attention.serving(slots):
                    return reader.logits(*step, reader.windows.no_mask(slots))
            if attention.serves is None:
                with attention.learning(slots):
                    return reader.logits(*step, reader.windows.mask(slots, reader.dtype))
        except NotServed:
            attention.serves = False
        return reader.logits(*step, reader.windows.mask(slots, reader.dtype))


class Reader:
    """How a model is called. layers: of keys and values. windows: what their tokens see."""

    def __init__(self, model: nn.Module, layers: int, windows: Windows) -> None:
        self.model, self.layers, self.windows = model, layers, windows
        first = next(p for p in model.parameters() if p.is_floating_point())
        self.dtype, self.device = first.dtype, first.device
        self.positions = "position_ids" in inspect.signature(without_adapter(model).forward).parameters
        self.attention = Attention(layers, first)
        self.learns = kernels_for(first) is not None  # whether modules that kernels serve are still looked for
        self.graphs = self.device.type == "cuda"
        self.uncaptured: set[str] = set()  # what could not be
        self._fused = FusedModules([*model.parameters()])
        self._pool: Any = None

    def logits(
        self, mode: SeatReads | None, cache: SlotCache, ids_nT: Tensor, at_nT: Tensor, mask: Any = None
    ) -> Tensor:
        """(n, T, V), or (n, 1, V) within `last_logits`."""
        given: dict[str, Any] = {"position_ids": at_nT} if self.positions else {}
        given |= {"input_ids": ids_nT, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        learning = self._fused.learning() if self.learns else nullcontext()
        with mode or nullcontext(), learning, self._fused.standing_in(mode):
            logits: Tensor = self.model(**given).logits
        return logits

    def last_logits(
        self, cache: SlotCache, mode: SeatReads | None, ids_nT: Tensor, at_nT: Tensor, last_n: Tensor
    ) -> Tensor:
        """(n, V): after each row's last token, which alone the output head sees, where the model says which that is."""
        head: Any = without_adapter(self.model).get_output_embeddings()
        rows_n = torch.arange(len(last_n), device=last_n.device)
        if head is None:
            return self.logits(mode, cache, ids_nT, at_nT)[rows_n, last_n]
        handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows_n, last_n][:, None], *args[1:]))
        try:
            return self.logits(mode, cache, ids_nT, at_nT)[:, -1]
        finally:
            handle.remove()

    def captured(self, run: Callable[[], None], what: str) -> Any:
        """What runs as a CUDA graph, or None where it cannot be one; then none of the later ones can."""
        if what in self.uncaptured:
            return None
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            return capture(run, self._pool)
        except Exception as error:  # anything a model does may be what a graph cannot hold
            self.uncaptured.add(what)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(
                "decode: %s are not captured as CUDA graphs (%s); they run one kernel at a time", what, first
            )
            return None
