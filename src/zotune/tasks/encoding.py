"""Examples → token ids, and token ids → batches."""

# S sequences, B rows, C candidates, T tokens, K answer positions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from zotune.errors import InputError
from zotune.tasks.chat import conversation_ids, question_ids
from zotune.tasks.task import Example


@dataclass(frozen=True)
class Encoded:
    """A prompt's ids, the ids that each candidate adds to it, and which candidate is right (−1: not known).

    counted: the places in the one candidate whose tokens count, where not all do.
    """

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    cut: int = 0
    golds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    counted: tuple[int, ...] = ()

    @property
    def learned(self) -> int:
        """Tokens of the right candidate that count."""
        return len(self.counted) or len(self.candidates[self.label])

    @property
    def asked(self) -> tuple[int, ...]:
        """What stands before the last answer: the prompt, and of a conversation the earlier turns."""
        if not self.counted:
            return self.prompt
        first = next(i for i in reversed(self.counted) if i - 1 not in set(self.counted))
        return self.prompt + self.candidates[0][:first]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + max(map(len, self.candidates))


class Encoder:
    """Turns examples into ids, refusing what the model cannot take.

    The answer's tokens are what the tokenizer adds when prompt and answer are encoded as one text, so that the model
    sees the tokens that it was trained on. max_length: prompt and answer together; None refuses whatever is longer
    than the model takes, a number cuts the start of longer prompts.
    """

    def __init__(self, tokenizer: Any, model_takes: int | None, max_length: int | None = None) -> None:
        if max_length is not None and model_takes is not None and max_length > model_takes:
            raise InputError(f"--max-length {max_length}: the model takes {model_takes} tokens")
        self.tokenizer, self.model_takes, self.max_length = tokenizer, model_takes, max_length

    def __call__(self, example: Example) -> Encoded:
        if example.messages:
            return self._conversation(example)
        if not example.prompt:
            return self._text(example)
        prompt = self._ids(example.prompt)
        if example.candidates == ("",):  # nothing to train on: an answer is to be generated
            kept, cut = self._kept(tuple(prompt), example)
            return Encoded(kept, ((),), -1, cut, example.golds)
        whole = [self._ids(example.prompt + text) for text in example.candidates]
        shared = min(_common_prefix(prompt, ids) for ids in whole)
        if shared == 0:
            raise InputError(f"{example.where}: the prompt has no token of its own before the answer")
        answers = tuple(tuple(ids[shared:]) for ids in whole)
        for text, answer in zip(example.candidates, answers, strict=True):
            if not answer:
                raise InputError(f"{example.where}: the answer {text!r} adds no token to the prompt")
        kept = tuple(prompt[:shared])
        longest = max(map(len, answers))
        limit = self.max_length or self.model_takes
        cut = 0
        if limit is not None and len(kept) + longest > limit:
            if self.max_length is None:
                raise InputError(
                    f"{example.where}: prompt and answer are {len(kept) + longest} tokens, the model takes {limit}; "
                    f"shorten the text, or cut its start with --max-length {limit}"
                )
            room = limit - longest
            head = self._special_head(kept)
            if room <= len(head):
                raise InputError(f"{example.where}: --max-length {limit} leaves no room for the prompt")
            cut = len(kept) - room
            kept = head + kept[len(kept) - room + len(head) :]
        label = -1 if example.label is None else example.label
        return Encoded(kept, answers, label, cut, example.golds, example.names)

    def _text(self, example: Example) -> Encoded:
        """Plain text: every token but the first counts, and the end of the text. What is too long loses its end."""
        ids, limit = self._ids(example.candidates[0]), self.max_length or self.model_takes
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        cut = max(0, len(ids) - limit) if limit is not None else 0
        if cut and self.max_length is None:
            raise InputError(
                f"{example.where}: the text is {len(ids)} tokens, the model takes {limit}; shorten it, or cut its end with "
                f"--max-length {limit}"
            )
        ids = ids[: len(ids) - cut]
        if len(ids) < 2:
            raise InputError(f"{example.where}: a text of one token has nothing to predict")
        return Encoded(tuple(ids[:1]), (tuple(ids[1:]),), 0, cut)

    def _conversation(self, example: Example) -> Encoded:
        """The chat template's words; assistant turns count. What is too long loses its start, but never the last question."""
        if example.label is None:
            question = question_ids(self.tokenizer, example.messages, example.where)
            kept, cut = self._kept(tuple(question), example)
            return Encoded(kept, ((),), -1, cut, example.golds)
        ids, places = conversation_ids(self.tokenizer, example.messages, example.learned, example.where)
        limit, cut = self.max_length or self.model_takes, 0
        if limit is not None and len(ids) > limit:
            if self.max_length is None:
                raise InputError(
                    f"{example.where}: the conversation is {len(ids)} tokens, the model takes {limit}; shorten it, or cut its "
                    f"start with --max-length {limit}"
                )
            head = len(self._special_head(tuple(ids)))
            cut = len(ids) - limit
            ids = ids[:head] + ids[head + cut :]
            inside = [place - cut for place in places if place - cut > head]
            if not inside or (len(inside) < len(places) and inside == list(range(head + 1, len(ids)))):
                raise InputError(f"{example.where}: --max-length {limit} leaves no room for the question")
            places = inside
        first = places[0]
        counted = tuple(place - first for place in places)
        answer = tuple(ids[first:])
        if len(counted) == len(answer):
            counted = ()
        return Encoded(tuple(ids[:first]), (answer,), 0, cut, example.golds, (), counted)

    def _kept(self, prompt: tuple[int, ...], example: Example) -> tuple[tuple[int, ...], int]:
        """What of a prompt is kept, and how many tokens of its start are not."""
        limit = self.max_length or self.model_takes
        if limit is None or len(prompt) <= limit:
            return prompt, 0
        if self.max_length is None:
            raise InputError(
                f"{example.where}: the prompt is {len(prompt)} tokens, the model takes {limit}; shorten the text, or cut its "
                f"start with --max-length {limit}"
            )
        head = self._special_head(prompt)
        return head + prompt[len(prompt) - limit + len(head) :], len(prompt) - limit

    def _ids(self, text: str) -> list[int]:
        """Ids with the tokenizer's own start (BOS, CLS), without its end (EOS, SEP): the answer follows."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        ends = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None}
        while len(ids) > 1 and ids[-1] in ends:
            ids.pop()
        return ids

    def _special_head(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        starts = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        return ids[:1] if ids[0] in starts else ()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass(frozen=True)
class Collator:
    """Encoded rows → one right-padded batch for a causal model.

    Right padding comes after every token that a loss reads, so a causal model needs no mask and no position ids. The
    last answer token is not fed: nothing is predicted from it.

    multiple: T is rounded up to one of it, so that batches have few shapes.
    loss "answer": a sequence a row, prompt and right answer.
    loss "candidates": all candidates of all rows; where each is a single token they share one sequence, the prompt.

    The batch: input_ids (S, T); positions (S, K) of the hidden states that predict the answer's tokens, targets (S, K),
    target_mask (S, K); labels (B,); and `candidates` (B, C) ids, or `present` (B, C): S = B·C, and a row
    with fewer candidates than C repeats its first.
    """

    loss: str
    pad_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        labels = torch.tensor([row.label for row in rows])
        if self.loss == "answer":
            pairs = [(row.prompt, row.candidates[row.label]) for row in rows]
            return {**self._sequences(pairs, [row.counted for row in rows]), "labels": labels}
        counts = [len(row.candidates) for row in rows]
        if len(set(counts)) == 1 and all(len(ids) == 1 for row in rows for ids in row.candidates):
            single = self._sequences([(row.prompt, row.candidates[0]) for row in rows])
            candidates = torch.tensor([[ids[0] for ids in row.candidates] for row in rows])
            return {**single, "candidates": candidates, "labels": labels}
        most = max(counts)  # rows stay together: S = B·C, so that each half of a doubled batch is a batch
        flat = [(row.prompt, (row.candidates + row.candidates[:1] * most)[c]) for row in rows for c in range(most)]
        present = torch.arange(most)[None, :] < torch.tensor(counts)[:, None]
        return {**self._sequences(flat), "present": present, "labels": labels}

    def _sequences(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], counted: Sequence[tuple[int, ...]] = ()
    ) -> dict[str, Tensor]:
        """counted: the places in each answer that a loss reads; none named: all of it."""
        places = [list(where or range(len(a))) for (_, a), where in zip_longest(pairs, counted)]
        longest = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
        length = -(-longest // self.multiple) * self.multiple
        most = max(map(len, places))
        input_ids = torch.full((len(pairs), length), self.pad_id)
        positions = torch.zeros((len(pairs), most), dtype=torch.long)
        targets = torch.zeros((len(pairs), most), dtype=torch.long)
        mask = torch.zeros((len(pairs), most), dtype=torch.bool)
        for s, (prompt, answer) in enumerate(pairs):
            ids = torch.tensor(prompt + answer[:-1])
            input_ids[s, : len(ids)] = ids
            k = len(places[s])
            positions[s, :k] = torch.tensor(places[s]) + len(prompt) - 1
            targets[s, :k] = torch.tensor(answer)[places[s]]
            mask[s, :k] = True
        return {"input_ids": input_ids, "positions": positions, "targets": targets, "target_mask": mask}
