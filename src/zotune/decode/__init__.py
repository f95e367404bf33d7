"""What perturbed models write: answers of a population, each member at θ + sign·ε·z(seed), from one copy of the weights.

A `Decoder` gives the answers of any requests (a prompt and the member that is to answer it). `decoder_for` chooses one: `slots`
(all members in one loop, each slot of it with a direction of its own), or `generate` (one member after the other, by transformers'
`generate` over a displaced copy). What a decoder computes from the weights is gone when `generate` returns, so that an update
cannot leave anything stale. It knows no task, no reward and no tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from zotune.errors import nearest

if TYPE_CHECKING:
    from torch import nn

    from zotune.directions import Directions

logger = logging.getLogger(__name__)

DECODERS = {
    "slots": "all members in one loop over one copy of the weights, each slot with a low-rank direction of its own",
    "generate": "a displaced copy a member and transformers' generate; any model, any directions",
}


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen and where an answer ends. All of it: nothing of a checkpoint's `generation_config` enters.

    temperature: 0 is greedy. top_k, top_p: what is drawn from, the k likeliest tokens, then the fewest that have p of these
    together; not beside 0. ends: tokens that end an answer. pad: stands where a row has no token. Raises ValueError.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ends: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: an answer has at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: has to be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: has to be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: has to be over 0 and at most 1")


class Member(NamedTuple):
    """A perturbed model: θ + sign·ε·z(seed). sign: −1 or +1."""

    seed: int
    sign: int


@dataclass(frozen=True)
class Request:
    """A prompt, of at least one token, and who is to answer it.

    row: the prompt's number in the step, which the draws depend on; the same prompt of several members has one row.
    member: a number in `members`; −1: the unperturbed model.
    """

    prompt: tuple[int, ...]
    row: int
    member: int = -1


@dataclass(frozen=True)
class Answer:
    """tokens: what was written, without the token that ended it. finished: it ended by itself. finite: all logits were numbers."""

    tokens: tuple[int, ...]
    finished: bool
    finite: bool = True


class Decoder(Protocol):
    """name: see `DECODERS`."""

    @property
    def name(self) -> str: ...

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
        """The answer of each request, in their order. The model is in eval mode meanwhile; weights are as they were.

        A draw is a function of (seed, step, row, position in the answer) alone, the same for all members (`decode.choosing`).
        An answer is cut where the model takes no more tokens. advance: told how many answers are new.
        Raises InputError, which names the row, for a prompt without a token or without room for one more.
        """
        ...


def decoder_for(
    model: nn.Module,
    directions: Directions,
    eps: float | Sequence[float],
    rank: int | None = None,
    slots: int | None = None,
    name: str = "auto",
) -> tuple[Decoder, str | None]:
    """A decoder of the model's members, and the line that says why it is another than `name` (or than `slots`, by `auto`).

    directions: the parameters that are displaced, and z's distribution. eps: σ of the places, one number or one a parameter
    group. rank: of low-rank directions, as the engine `lowrank` draws them; None: dense ones, as the other engines do.
    slots: rows of a decode step, at most; None: what suits the device. Raises ValueError for an unknown name.
    """
    if name not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {name!r}; {nearest(name, ['auto', *DECODERS])}")
    from zotune.decode.cache import layers_of
    from zotune.decode.members import Population
    from zotune.decode.plain import ROWS, GenerateDecoder
    from zotune.decode.slots import SlotsDecoder

    population = Population(directions, eps, rank)
    if name == "generate":
        return GenerateDecoder(model, population, slots or ROWS), None
    layers = layers_of(model)
    if isinstance(layers, str):
        line = f"decoder slots: {layers}; answers are written by generate, one member after the other"
        return GenerateDecoder(model, population, slots or ROWS), line
    return SlotsDecoder(model, population, *layers, slots), None
