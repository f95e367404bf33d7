"""Answers that a model writes: greedy, in batches, up to the end of the line, or of the reply."""

# B rows, T tokens.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from zotune.errors import InputError
from zotune.models.finite import refuse_rows
from zotune.models.kinds import without_adapter
from zotune.models.loading import length_limit
from zotune.tasks.encoding import Encoded

MOST_TOKENS = 50
REPLY_TOKENS = 256  # of a reply in a conversation, which may have several lines


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and their mask."""
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, longest - len(prompt) :] = 1
    return ids_BT, mask_BT


def write(
    model: nn.Module,
    tokenizer: Any,
    ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    pad_id: int,
    most: int | None = None,
    reply: bool = False,
) -> list[str | None]:
    """The line that the model writes after each prompt, greedily, at most so many tokens; reply: all its lines. None where
    the logits of any of its tokens are not finite: the likeliest is then whatever stands first.

    Never more than the model takes. Raises InputError where a prompt leaves no room.
    """
    most = most or (REPLY_TOKENS if reply else MOST_TOKENS)
    takes = length_limit(model)
    if takes is not None and (most := min(most, takes - ids_BT.shape[1])) < 1:
        raise InputError(
            f"a prompt of {ids_BT.shape[1]} tokens leaves no room to answer, the model takes {takes}; cut its start with "
            f"--max-length {takes - MOST_TOKENS if takes > 2 * MOST_TOKENS else takes // 2}"
        )
    generate: Any = model.generate
    with _greedy(model, pad_id, most):
        watch = _Finite(ends_of(model))
        written = generate(input_ids=ids_BT, attention_mask=mask_BT, logits_processor=LogitsProcessorList([watch]))
    texts = [tokenizer.decode(ids[ids_BT.shape[1] :], skip_special_tokens=True) for ids in written.tolist()]
    lines = [text.strip() if reply else text.strip().split("\n")[0].strip() for text in texts]
    return [line if sound else None for line, sound in zip(lines, watch.rows(), strict=True)]


class _Finite(LogitsProcessor):
    """Notes the rows whose logits are not finite before they end. It reads the logits once more, beside the head that makes them,
    and waits for no device."""

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends = list(ends)
        self.sound_B: Tensor | None = None
        self.ended_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite_B = scores.amax(-1).isfinite()  # NaN is the largest of what it is among
        if self.sound_B is None or self.ended_B is None:
            self.sound_B, self.ended_B = finite_B, torch.zeros_like(finite_B)
            return scores
        for end in self.ends:
            self.ended_B = self.ended_B | (input_ids[:, -1] == end)
        self.sound_B = self.sound_B & (finite_B | self.ended_B)
        return scores

    def rows(self) -> list[bool]:
        assert self.sound_B is not None
        return [bool(sound) for sound in self.sound_B.tolist()]


def ends_of(model: nn.Module) -> list[int]:
    """Ids of the tokens that `generate` ends at."""
    config = getattr(without_adapter(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


@contextmanager
def _greedy(model: nn.Module, pad_id: int, most: int) -> Iterator[None]:
    """The likeliest token each time, whatever else the checkpoint asks for (penalties, beams, lengths): of that only its ends.

    `generate` fills what its caller leaves open with the model's own, so this stands in its place.
    """
    base: Any = without_adapter(model)
    own = base.generation_config
    ends = own.eos_token_id if own is not None else None
    base.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=pad_id, max_new_tokens=most, do_sample=False
    )
    try:
        yield
    finally:
        base.generation_config = own


@torch.inference_mode()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    most: int | None = None,
    reply: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """What the model writes after each prompt, in the order given; see `write`. Raises NotFinite where logits are not.

    Prompts are padded on the left, with a mask; rows of like length share a batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    answers: list[str | None] = [None] * len(rows)
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids_BT, mask_BT = left_padded([rows[i].prompt for i in chosen], pad_id)
            texts = write(
                model, tokenizer, ids_BT.to(device), mask_BT.to(device), pad_id=pad_id, most=most, reply=reply
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
            advance(len(chosen))
    finally:
        model.train(was_training)
    refuse_rows(model, answers.count(None), len(rows), "the logits of what it writes are")
    return [answer for answer in answers if answer is not None]
