"""The decoder for any model: a displaced copy a member, and transformers' `generate`."""

# B rows, T tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from zotune.decode.asking import Answer, Request, Settings
from zotune.decode.choosing import Draws, choose, draw_seeds
from zotune.decode.members import Population
from zotune.errors import InputError
from zotune.models.kinds import without_adapter
from zotune.models.loading import length_limit

ROWS = 32  # of a call of generate, where nothing else is said


def room_of(model: nn.Module, requests: Sequence[Request], members: int, most: int) -> list[int]:
    """How many tokens each answer may have. Raises InputError for a prompt without a token, or without room for one more."""
    takes = length_limit(model)
    for request in requests:
        if not -1 <= request.member < members:
            raise ValueError(f"a request is to member {request.member}, and there are {members}, counted from 0")
        if not request.prompt:
            raise InputError(f"prompt {request.row} has no token; give it a text, or a token to begin with")
        if takes is not None and len(request.prompt) >= takes:
            raise InputError(
                f"prompt {request.row} of {len(request.prompt)} tokens leaves no room to answer, the model takes {takes}; "
                "shorten it"
            )
    return [most if takes is None else min(most, takes - len(request.prompt)) for request in requests]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def only(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """`generate` as this says, whatever else the checkpoint asks for (penalties, beams, lengths).

    It fills what its caller leaves open with the model's own, so this stands in its place.
    """
    base: Any = without_adapter(model)
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


# What a checkpoint's generation_config may hold that changes no answer, or that settings always say.
SAID = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache",
    "transformers_version", "cache_implementation", "cache_config", "return_dict_in_generate",
}  # fmt: skip


def left_out(model: nn.Module) -> str | None:
    """A line about what the checkpoint asks of `generate` and no decoder of ours does; None where that is nothing."""
    config: Any = getattr(without_adapter(model), "generation_config", None)
    asked = {} if config is None else config.to_diff_dict()
    more = [f"{name} {asked[name]}" for name in asked if name not in SAID and not name.startswith(("_", "output_"))]
    if not more:
        return None
    return (
        f"the checkpoint's generation_config asks for {', '.join(more)}; this is left out: what is said of temperature, top_k and "
        "top_p counts alone, in training and evaluation"
    )


class _Choice(LogitsProcessor):
    """Leaves each row the token that `choose` takes, and remembers whether the logits before it were numbers."""

    def __init__(self, settings: Settings, seeds_BK: Tensor, first: int) -> None:
        self.settings, self.seeds_BK, self.first = settings, seeds_BK, first
        self.finite: list[Tensor] = []
        self._draws: Draws | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.finite.append(scores.amax(-1).isfinite())  # NaN goes through a maximum
        if self.settings.temperature == 0:
            return scores
        self._draws = self._draws or Draws(torch.empty(scores.shape, device=scores.device))
        gumbel_BV = self._draws.draw(self.seeds_BK[:, input_ids.shape[1] - self.first])
        chosen_B = choose(scores, self.settings, gumbel_BV)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B[:, None], 0)


class GenerateDecoder:
    """See `zotune.decode.Decoder`. rows: of one call of `generate`."""

    name = "generate"

    def __init__(self, model: nn.Module, population: Population, rows: int = ROWS) -> None:
        self.model, self.population, self.rows = model, population, rows

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
        room = room_of(self.model, requests, len(members), settings.max_new_tokens)
        at = self.population.at(members)
        answers: dict[int, Answer] = {}
        copies: dict[int, Tensor] = {}
        # answers of one length limit share a call: the model may take no more of one of them
        order = sorted(range(len(requests)), key=lambda i: (requests[i].member, room[i], len(requests[i].prompt), i))
        with in_eval_mode(self.model):
            for member, of_member in groupby(order, key=lambda i: requests[i].member):
                if member < 0:
                    self._write(requests, list(of_member), room, settings, (seed, step), answers, advance)
                    continue
                with self.population.standing_in(at.some(member, member + 1), copies):
                    self._write(requests, list(of_member), room, settings, (seed, step), answers, advance)
        return [answers[i] for i in range(len(requests))]

    def _write(
        self,
        requests: Sequence[Request],
        chosen: list[int],
        room: list[int],
        settings: Settings,
        drawn_by: tuple[int, int],
        answers: dict[int, Answer],
        advance: Callable[[int], None],
    ) -> None:
        """The answers of one member's requests, in calls of so many rows."""
        for most, alike in groupby(chosen, key=lambda i: room[i]):
            some = list(alike)
            for first in range(0, len(some), self.rows):
                rows = some[first : first + self.rows]
                written = self._call([requests[i] for i in rows], most, settings, drawn_by)
                answers |= dict(zip(rows, written, strict=True))
                advance(len(rows))

    def _call(
        self, requests: Sequence[Request], most: int, settings: Settings, drawn_by: tuple[int, int]
    ) -> list[Answer]:
        device = next(self.model.parameters()).device
        longest = max(len(request.prompt) for request in requests)
        ids_BT = torch.full((len(requests), longest), settings.pad)
        mask_BT = torch.zeros_like(ids_BT)
        for b, request in enumerate(requests):
            ids_BT[b, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask_BT[b, longest - len(request.prompt) :] = 1
        draws = most if settings.temperature else 0
        choice = _Choice(settings, draw_seeds(*drawn_by, [r.row for r in requests], draws, device), longest)
        config = GenerationConfig(
            eos_token_id=list(settings.ends) or None, pad_token_id=settings.pad, max_new_tokens=most, do_sample=False
        )
        generate: Any = self.model.generate
        with only(self.model, config):
            written_BT = generate(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), logits_processor=[choice]
            )
        finite_BK = torch.stack(choice.finite, 1).tolist()
        return [
            self._answer(ids, finite, settings)
            for ids, finite in zip(written_BT[:, longest:].tolist(), finite_BK, strict=True)
        ]

    @staticmethod
    def _answer(ids: list[int], finite: list[bool], settings: Settings) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in settings.ends), None)
        used = len(ids) if end is None else end + 1
        return Answer(tuple(ids[:end]), end is not None, all(finite[:used]))
