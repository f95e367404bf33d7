"""The decoder of our own: all members in one loop of decode steps over a fixed set of slots.

A slot reads a prompt, writes its answer a token a step, and is given the next request when that has ended. Low-rank members share
each step, a direction a slot beside one product with the weights; dense ones take turns, each as a displaced copy of the weights.
"""

# S slots, n of them, T tokens, V vocabulary.

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from zotune.decode.asking import Answer, Request, Settings
from zotune.decode.cache import Windows
from zotune.decode.choosing import draw_seeds
from zotune.decode.loop import Loop, Reader
from zotune.decode.members import Population
from zotune.decode.plain import GenerateDecoder, in_eval_mode, room_of
from zotune.decode.seats import MemberWeights
from zotune.engines.following import most_tokens

logger = logging.getLogger(__name__)

SLOTS_ON_CPU, SLOTS_ON_CUDA = 32, 256  # where nothing else is said
REFILL = 8  # one slot in so many is free before others are begun: the prefill of a prompt costs a step by itself
# Without further requests a loop goes on with a part of its slots, one in so many; on CUDA a graph is captured of each size.
SHRINK, SHRINK_ON_CUDA = 2, 4
# On CUDA prompts are padded to a multiple of the one, and the columns of slots allotted to one of the other: few shapes are met.
BUCKET, ROOM = 16, 64
KEPT = 4  # loops of other slots, room or settings that wait to be used again on CUDA

# Of a first answer's logits, what may be off beside their spread, against those of a forward over the whole sequence.
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
NEAR_IN_16_BITS = 0.1
CHECKED, CHECKED_TOKENS = 4, 4  # requests, and tokens of each


class SlotsDecoder:
    """See `zotune.decode.Decoder`. slots: rows of a step, at most.

    The first answers are looked at again by forwards over whole sequences: a model that mixes rows, or does not take its positions
    from what it is given, is found out. Then, and where a forward cannot be followed, `generate` does the work, and a line says so.
    On CUDA loops keep their memory and their graphs; what is in the memory is written anew before it is read.
    """

    def __init__(
        self, model: nn.Module, population: Population, layers: int, windows: Windows, slots: int | None
    ) -> None:
        self.model, self.population = model, population
        self.reader = Reader(model, layers, windows)
        self.on_card = self.reader.device.type == "cuda"
        self.shrink = SHRINK_ON_CUDA if self.on_card else SHRINK
        self.slots = slots or (SLOTS_ON_CUDA if self.on_card else SLOTS_ON_CPU)
        self.plain = GenerateDecoder(model, population, self.slots)
        self.usable: bool | None = None  # not known before the first answers
        self.why = ""
        self._kept: dict[Any, Loop] = {}
        self._weights: MemberWeights | None = None

    @property
    def name(self) -> str:
        return self.plain.name if self.usable is False else "slots"

    def generate(
        self,
        requests: Sequence[Request],
        members: Sequence[tuple[int, int]],
        *,
        settings: Settings,
        seed: int,
        step: int,
        advance: Callable[[int], None] = lambda answers: None,
    ) -> list[Answer]:
        limits = room_of(self.model, requests, len(members), settings.max_new_tokens)
        with in_eval_mode(self.model):
            if self.usable is None and requests:
                self._try(requests, members, settings)
            if self.usable is False:
                return self.plain.generate(requests, members, settings=settings, seed=seed, step=step, advance=advance)
            return _Work(self, requests, limits, settings, (seed, step), self.slots, advance).answers_of(members)

    def weights(self, members: Sequence[tuple[int, int]]) -> MemberWeights:
        """Of low-rank members, drawn; on CUDA where those of the last as many were."""
        drawn = self._weights
        if drawn is None or drawn.count != len(members):
            drawn = MemberWeights(self.population, len(members))
        drawn.draw(members)
        self._weights = drawn if self.on_card else None
        return drawn

    def loop(self, slots: int, room: int, settings: Settings, weights: MemberWeights | None) -> Loop:
        """An empty one; on CUDA one that was there before, if the weights still are where its graph finds them."""
        if not self.on_card:
            return Loop(self.reader, slots, room, settings, weights)
        room = -(-room // ROOM) * ROOM
        where = tuple(p.data_ptr() for p in self.model.parameters())
        key = slots, room, settings, id(weights), where
        loop = self._kept.pop(key, None) or Loop(self.reader, slots, room, settings, weights)
        self._kept[key] = loop
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return loop

    def _try(self, requests: Sequence[Request], members: Sequence[tuple[int, int]], settings: Settings) -> None:
        """Whether answers by slots are those of the model, found out on a few of these requests."""
        why = self._wrong(requests, members, settings)
        if why is not None and self.reader.attention.serves is not False:  # the model may ask for more than it says
            self.reader.attention.serves = False
            why = self._wrong(requests, members, settings)
        if why is not None:
            self._give_up(why)

    def _wrong(self, requests: Sequence[Request], members: Sequence[tuple[int, int]], settings: Settings) -> str | None:
        """Why answers by slots cannot be used, None if nothing says so."""
        try:
            off = self._off(requests, members, settings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything a model does may be what a loop of ours cannot follow
            return (str(error).splitlines() or [type(error).__name__])[0]
        if off is None:
            return None
        self.reader.learns = False
        if off > NEAR.get(self.reader.dtype, NEAR_IN_16_BITS):
            return f"its logits are {off:.2g} of their spread off those of whole sequences"
        self.usable = True
        return None

    def _off(self, requests: Sequence[Request], members: Sequence[tuple[int, int]], settings: Settings) -> float | None:
        """How far the logits of a few first tokens are off, beside their spread; None where there are no numbers to compare."""
        of_each = {request.member: request for request in sorted(requests, key=lambda request: -len(request.prompt))}
        some = [*of_each.values()][:CHECKED]
        while len(some) < min(CHECKED, len(requests)):
            some.append(requests[len(some)])
        few = replace(settings, max_new_tokens=CHECKED_TOKENS, temperature=0.0, top_k=None, top_p=None, ends=())
        seen: dict[int | None, list[Tensor]] = {}
        limits = room_of(self.model, some, len(members), CHECKED_TOKENS)
        slots = max(1, min(self.slots, len(some) // 2))  # so that slots are used again
        answers = _Work(self, some, limits, few, (0, 0), slots, lambda answers: None, seen).answers_of(members)
        worst = None
        for i, (request, answer) in enumerate(zip(some, answers, strict=True)):
            ours_KV = torch.stack(seen[i]).double()
            theirs_KV = self._whole(request, answer, members)[-len(ours_KV) :].double()
            if theirs_KV.isfinite().all():
                off = float((ours_KV - theirs_KV).square().mean().sqrt() / theirs_KV.std().clamp(min=1e-30))
                worst = max(worst or 0.0, off if off == off else float("inf"))
        return worst

    def _whole(self, request: Request, answer: Answer, members: Sequence[tuple[int, int]]) -> Tensor:
        """(T, V): the logits of all but the answer's last token, by one forward without a cache."""
        ids_1T = torch.tensor([[*request.prompt, *answer.tokens[:-1]]], device=self.reader.device)

        def logits() -> Any:
            return self.model(input_ids=ids_1T, use_cache=False).logits[0]

        if request.member < 0:
            return cast(Tensor, logits())
        at = self.population.at(members).some(request.member, request.member + 1)
        if self.population.engine is not None:
            return cast(Tensor, self.population.engine.loss(logits, at))
        with self.population.standing_in(at, {}):
            return cast(Tensor, logits())

    def _give_up(self, why: str) -> None:
        self.usable, self.why = False, why
        logger.warning("decoder slots: %s; answers are written by generate, one member after the other", why)


class _Work:
    """Requests and what all of their loops share. seen: is given the logits of their tokens, by request."""

    def __init__(
        self,
        decoder: SlotsDecoder,
        requests: Sequence[Request],
        limits: Sequence[int],
        settings: Settings,
        drawn_by: tuple[int, int],
        slots: int,
        advance: Callable[[int], None],
        seen: dict[int | None, list[Tensor]] | None = None,
    ) -> None:
        self.decoder, self.requests, self.limits, self.settings, self.drawn_by = (
            decoder,
            requests,
            limits,
            settings,
            drawn_by,
        )
        self.slots, self.advance, self.seen = slots, advance, seen
        self.answers: dict[int, Answer] = {}

    def answers_of(self, members: Sequence[tuple[int, int]]) -> list[Answer]:
        """In the order of the requests."""
        population, of = self.decoder.population, self._member
        every = range(len(self.requests))
        if population.engine is not None and any(of(i) >= 0 for i in every):
            self._answer(every, self.decoder.weights(members))
        else:
            at, copies = population.at(members), dict[int, Tensor]()
            for member, chosen in groupby(sorted(every, key=of), of):
                with population.standing_in(at.some(member, member + 1), copies) if member >= 0 else nullcontext():
                    self._answer(list(chosen), None)
        return [self.answers[i] for i in every]

    def _member(self, number: int) -> int:
        return self.requests[number].member

    def _answer(self, chosen: Sequence[int], weights: MemberWeights | None) -> None:
        """One loop over these requests. weights: see `Loop`."""
        room = max(len(self.requests[i].prompt) + self.limits[i] for i in chosen)
        slots = min(self.slots, len(chosen))
        loop = self.decoder.loop(slots, room, self.settings, weights)
        loop.clear(self.seen)
        # the long ones begin first, and prompts of like length together
        queue = deque(sorted(chosen, key=lambda i: -len(self.requests[i].prompt)))
        while True:
            alive = loop.board.alive_S.tolist()
            if found := loop.board.read(alive):
                self.answers |= found
                self.advance(len(found))
            free = [slot for slot, going in enumerate(alive) if not going]
            if queue and len(free) >= max(1, min(len(queue), slots // REFILL)):
                self._begin(loop, queue, free)
                continue
            if len(free) == slots:
                return
            if slots - len(free) <= (fewer := slots // self.decoder.shrink):
                smaller = self.decoder.loop(fewer, room, self.settings, weights)
                smaller.take(loop, [slot for slot, going in enumerate(alive) if going])
                slots, loop = fewer, smaller
            loop.steps()

    def _begin(self, loop: Loop, queue: deque[int], free: list[int]) -> None:
        """The next requests into the free slots, as many prompts at a time as a forward may have tokens."""
        device, multiple = self.decoder.reader.device, BUCKET if self.decoder.on_card else 1
        while queue and free:
            longest = len(self.requests[queue[0]].prompt)
            tokens = max(longest, min(-(-longest // multiple) * multiple, loop.slots.room))
            each = max(1, most_tokens(device) // tokens)
            numbers = [queue.popleft() for _ in range(min(len(queue), len(free), each))]
            some = [self.requests[i] for i in numbers]
            draws = self.settings.max_new_tokens if self.settings.temperature else 0
            seeds_nK = draw_seeds(*self.drawn_by, [request.row for request in some], draws, device)
            slots_n = loop.board.seat(free[: len(some)], numbers, some, [self.limits[i] for i in numbers], seeds_nK)
            free = free[len(some) :]
            loop.prefill(slots_n, some, tokens)
