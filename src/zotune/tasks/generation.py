"""Answers that a model writes: greedy, in batches, up to their end."""

# B rows, T tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from zotune.errors import InputError
from zotune.models.finite import refuse_rows
from zotune.models.ids import padding_counts
from zotune.models.loading import length_limit
from zotune.tasks import ends
from zotune.tasks.chat import end_marks
from zotune.tasks.encoding import Encoded

LINE = "\n"  # ends an answer where the task names no other end
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


@dataclass(frozen=True)
class Answer:
    """What a model wrote. ended: before the most tokens that it may have. finite: all its logits were numbers."""

    text: str
    ended: bool = True
    finite: bool = True


class _Finite(LogitsProcessor):
    """Looks whether a row's logits are numbers, token by token; where they are none the likeliest token is any. It reads the logits
    once more, beside the head that makes them, and waits for no device."""

    def __init__(self) -> None:
        self.seen_B: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.seen_B.append(scores.amax(-1).isfinite())  # NaN goes through a maximum
        return scores

    def first_not(self) -> list[int]:
        """Of each row the place of the first token whose logits were no numbers; behind all tokens where there is none."""
        rows = torch.stack(self.seen_B, 1).tolist()
        return [row.index(False) if False in row else len(row) for row in rows]


def write(
    model: nn.Module,
    tokenizer: Any,
    ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    pad_id: int,
    most: int | None = None,
    reply: bool = False,
    end: str | None = LINE,
    more_ends: Iterable[int] = (),
) -> list[Answer]:
    """What the model writes after each prompt, greedily, up to its end, at most so many tokens.

    It ends at the tokenizer's end, the model's own (`generation_config`) or one of more_ends, and at the text `end` if one is
    given. reply: of a conversation, up to the mark that the chat template writes; of more tokens. Never more than the model takes.
    A row's answer depends on no other: rows share a forward that may have as many tokens, and where padding would count (virtual
    tokens) are of one length. Raises InputError where a prompt leaves no room.
    """
    most = most or (REPLY_TOKENS if reply else MOST_TOKENS)
    takes, lengths = length_limit(model), mask_BT.sum(1).tolist()
    rooms = [most if takes is None else min(most, takes - length) for length in lengths]
    if takes is not None and min(rooms) < 1:
        raise InputError(
            f"a prompt of {max(lengths)} tokens leaves no room to answer, the model takes {takes}; cut its start with "
            f"--max-length {takes - MOST_TOKENS if takes > 2 * MOST_TOKENS else takes // 2}"
        )
    kinds = list(zip(lengths, rooms, strict=True)) if padding_counts(model) else [(0, room) for room in rooms]
    if len(set(kinds)) > 1:
        told: dict[str, Any] = {"pad_id": pad_id, "most": most, "reply": reply, "end": end, "more_ends": [*more_ends]}
        found: dict[int, Answer] = {}
        for kind in sorted(set(kinds)):
            rows = [b for b, other in enumerate(kinds) if other == kind]
            longest = max(lengths[b] for b in rows)
            some = ids_BT[rows, -longest:], mask_BT[rows, -longest:]
            found |= dict(zip(rows, write(model, tokenizer, *some, **told), strict=True))
        return [found[b] for b in range(len(kinds))]
    most = rooms[0]
    stops = ends.of(model) | {*more_ends} | {tokenizer.eos_token_id} - {None}
    end = None if reply else end
    until = [ends.Until(end, tokenizer, ids_BT.shape[1])] if end else []
    finite = _Finite()
    generate: Any = model.generate
    with ends.greedy(model, pad_id, most, stops):
        written = generate(input_ids=ids_BT, attention_mask=mask_BT, stopping_criteria=until, logits_processor=[finite])
    answers = []
    for ids, bad in zip(written[:, ids_BT.shape[1] :].tolist(), finite.first_not(), strict=True):
        own = next((i for i, token in enumerate(ids) if token in stops), None)
        text = str(tokenizer.decode(ids[:own], skip_special_tokens=True))
        ended = own is not None or (bool(end) and str(end) in text)
        # a row that has ended is fed padding until the longest has, and what comes of that is nobody's
        before = bad >= len(ids) or (own is not None and own < bad)
        fine = before or (bool(end) and str(end) in str(tokenizer.decode(ids[:bad], skip_special_tokens=True)))
        answers.append(Answer((text.split(end)[0] if end else text).strip(), ended, fine))
    return answers


def generate_answers(model: nn.Module, tokenizer: Any, rows: Sequence[Encoded], **options: Any) -> list[str]:
    """The texts alone of `answers_of`."""
    return [answer.text for answer in answers_of(model, tokenizer, rows, **options)]


@torch.inference_mode()
def answers_of(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    most: int | None = None,
    reply: bool = False,
    end: str | None = LINE,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """What the model writes after each prompt, in the order given; see `write`. It ends where the rows' right answers do, too.
    Raises NotFinite where logits are not.

    Prompts are padded on the left, with a mask; rows of like length share a batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    more_ends = ends.taught(rows, tokenizer) | (end_marks(tokenizer) if reply else set())
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    answers = [Answer("")] * len(rows)
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids_BT, mask_BT = left_padded([rows[i].prompt for i in chosen], pad_id)
            written = write(
                model, tokenizer, ids_BT.to(device), mask_BT.to(device), pad_id=pad_id, most=most, reply=reply, end=end,
                more_ends=more_ends,
            )  # fmt: skip
            for i, answer in zip(chosen, written, strict=True):
                answers[i] = answer
            advance(len(chosen))
    finally:
        model.train(was_training)
    refuse_rows(model, sum(not answer.finite for answer in answers), len(rows), "the logits of what it writes are")
    return answers
