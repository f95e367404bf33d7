"""Answers that a model writes: greedy, in batches, up to the end of the line, or of the reply."""

# B rows, T tokens.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from zotune.errors import InputError
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
) -> list[str]:
    """The line that the model writes after each prompt, greedily, at most so many tokens; reply: all its lines.

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
        written = generate(input_ids=ids_BT, attention_mask=mask_BT)
    texts = [tokenizer.decode(ids[ids_BT.shape[1] :], skip_special_tokens=True) for ids in written.tolist()]
    return [text.strip() if reply else text.strip().split("\n")[0].strip() for text in texts]


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
    """What the model writes after each prompt, in the order given; see `write`.

    Prompts are padded on the left, with a mask; rows of like length share a batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    answers = [""] * len(rows)
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
    return answers
