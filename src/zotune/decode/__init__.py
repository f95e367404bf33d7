"""What perturbed models write: answers of a population, each member at θ + sign·ε·z(seed), from one copy of the weights.

A `Decoder` gives the answers of any requests (a prompt and the member that is to answer it). `decoder_for` chooses one: `slots`
(all members in one loop, each slot of it with a direction of its own), or `generate` (one member after the other, by transformers'
`generate` over a displaced copy). What a decoder computes from the weights is gone when `generate` returns, so that an update
cannot leave anything stale. It knows no task, no reward and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zotune.decode.asking import Answer, Decoder, Member, Request, Settings
from zotune.errors import nearest

if TYPE_CHECKING:
    from torch import nn

    from zotune.directions import Directions

__all__ = ["DECODERS", "Answer", "Decoder", "Member", "Request", "Settings", "decoder_for"]

DECODERS = {
    "slots": "all members in one loop over one copy of the weights, each slot with a low-rank direction of its own",
    "generate": "a displaced copy a member and transformers' generate; any model, any directions",
}


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
