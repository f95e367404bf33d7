"""Examples → token ids, and token ids → batches."""

# S sequences, B rows, C candidates, T tokens, K answer positions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.errors import InputError
from zotune.tasks.task import Example


@dataclass(frozen=True)
class Encoded:
    """A prompt's ids, the ids that each candidate adds to it, and which candidate is right (−1: not known)."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    cut: int = 0
    golds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

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
        prompt = self._ids(example.prompt)
        if example.candidates == ("",):  # nothing to train on: an answer is to be generated
            return Encoded(self._kept(tuple(prompt), example), ((),), -1, 0, example.golds)
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

    def _kept(self, prompt: tuple[int, ...], example: Example) -> tuple[int, ...]:
        limit = self.max_length or self.model_takes
        if limit is None or len(prompt) <= limit:
            return prompt
        if self.max_length is None:
            raise InputError(f"{example.where}: the prompt is {len(prompt)} tokens, the model takes {limit}")
        head = self._special_head(prompt)
        return head + prompt[len(prompt) - limit + len(head) :]

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
            return {**self._sequences([(r.prompt, r.candidates[r.label]) for r in rows]), "labels": labels}
        counts = [len(row.candidates) for row in rows]
        if len(set(counts)) == 1 and all(len(ids) == 1 for row in rows for ids in row.candidates):
            single = self._sequences([(row.prompt, row.candidates[0]) for row in rows])
            candidates = torch.tensor([[ids[0] for ids in row.candidates] for row in rows])
            return {**single, "candidates": candidates, "labels": labels}
        most = max(counts)  # rows stay together: S = B·C, so that each half of a doubled batch is a batch
        flat = [(row.prompt, (row.candidates + row.candidates[:1] * most)[c]) for row in rows for c in range(most)]
        present = torch.arange(most)[None, :] < torch.tensor(counts)[:, None]
        return {**self._sequences(flat), "present": present, "labels": labels}

    def _sequences(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Tensor]:
        longest = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
        length = -(-longest // self.multiple) * self.multiple
        most = max(len(answer) for _, answer in pairs)
        input_ids = torch.full((len(pairs), length), self.pad_id)
        positions = torch.zeros((len(pairs), most), dtype=torch.long)
        targets = torch.zeros((len(pairs), most), dtype=torch.long)
        mask = torch.zeros((len(pairs), most), dtype=torch.bool)
        for s, (prompt, answer) in enumerate(pairs):
            ids = torch.tensor(prompt + answer[:-1])
            input_ids[s, : len(ids)] = ids
            k = len(answer)
            positions[s, :k] = torch.arange(len(prompt) - 1, len(prompt) - 1 + k)
            targets[s, :k] = torch.tensor(answer)
            mask[s, :k] = True
        return {"input_ids": input_ids, "positions": positions, "targets": targets, "target_mask": mask}
