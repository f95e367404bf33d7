"""Examples → token ids, and token ids → batches."""

# S sequences, B rows, C candidates, T tokens, K answer positions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from zotune.errors import InputError
from zotune.models.ids import refuse_beyond
from zotune.tasks.chat import (
    check_honoured,
    conversation_ids,
    places_within,
    question_ids,
    question_places,
    remaining,
)
from zotune.tasks.ends import marks
from zotune.tasks.task import MASK, Example


@dataclass(frozen=True)
class Encoded:
    """A prompt's ids, the ids that each candidate adds to it, and which candidate is right (−1: not known).

    counted: the places in the one candidate whose tokens count, where not all do.
    mask, tail: of a masked model, the token that stands in the answer's place, once for each of its tokens, and what follows it.
    A classifier's candidates add nothing: they are its outputs. outputs: which of them is each candidate's; (): they are in order.
    ended: whether the answer's last token is its end.
    """

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    cut: int = 0
    golds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    counted: tuple[int, ...] = ()
    mask: int | None = None
    tail: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    ended: bool = False

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
        return len(self.prompt) + max(map(len, self.candidates)) + len(self.tail)

    @property
    def classified(self) -> bool:
        return len(self.candidates) > 1 and not any(self.candidates)


class Encoder:
    """Turns examples into ids, refusing what the model cannot take.

    The answer's tokens are what the tokenizer makes of it when prompt and answer are encoded as one text, so that the model
    sees the tokens that it was trained on. An answer to generate ends in the token that the row writes for it, else in the task's
    end, else in the tokenizer's; a text in one that it writes, else in the tokenizer's.

    max_length: prompt and answer together; None refuses whatever is longer than the model takes, a number cuts longer prompts; see
    `_fit`.

    kind "causal": the answer follows the prompt. "masked": the answer stands where the prompt has `<mask>` (or the tokenizer's own
    mask), else at its end, before a full stop; an answer of k tokens is k masks. "classifier": the prompt alone.
    outputs: of a classifier, the output of each of the task's labels. vocabulary: ids that the model has a row for.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_takes: int | None,
        max_length: int | None = None,
        kind: str = "causal",
        outputs: Sequence[int] = (),
        vocabulary: int | None = None,
    ) -> None:
        self.outputs = () if list(outputs) == [*range(len(outputs))] else tuple(outputs)
        if max_length is not None and model_takes is not None and max_length > model_takes:
            raise InputError(f"--max-length {max_length}: the model takes {model_takes} tokens")
        if kind == "masked" and (tokenizer.mask_token_id is None or not tokenizer.is_fast):
            lacks = (
                "has no mask token" if tokenizer.mask_token_id is None else "tells no offsets (it is not a fast one)"
            )
            raise InputError(f"--model-kind masked: the model's tokenizer {lacks}")
        self.tokenizer, self.model_takes, self.max_length, self.kind = tokenizer, model_takes, max_length, kind
        self.vocabulary = vocabulary
        self.marks = marks(tokenizer)
        self.marks_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(self.marks)))
        self.before, self.behind = _around(tokenizer)

    def __call__(self, example: Example) -> Encoded:
        row = self._row(example)
        mask = [] if row.mask is None else [row.mask]
        ids = [*row.prompt, *chain(*row.candidates), *mask, *row.tail]
        refuse_beyond(ids, self.vocabulary, self.tokenizer, example.where)
        return row

    def _row(self, example: Example) -> Encoded:
        if self.kind == "causal":
            return self._continued(example)
        if example.messages or not example.prompt:
            raise InputError(
                f"{example.where}: plain text and conversations are for causal models, this is a {self.kind} one"
            )
        label = -1 if example.label is None else example.label
        if self.kind == "classifier":
            ids = tuple(self._encoded(example.prompt)[0])
            if (n := self.behind) and ids[-n:] == ids[-2 * n : -n]:  # the text ends itself
                ids = ids[:-n]
            kept, cut = self._fit(ids, 0, example, "the prompt is")
            return Encoded(kept, ((),) * len(example.candidates), label, cut, outputs=self.outputs)
        prompt, answers, tail = self._filled(example)
        kept, cut = self._fit(prompt, max(map(len, answers)) + len(tail), example, "prompt and answer are")
        mask = self.tokenizer.mask_token_id
        return Encoded(kept, answers, label, cut, example.golds, example.names, mask=mask, tail=tail)

    def _continued(self, example: Example) -> Encoded:
        if example.messages:
            return self._conversation(example)
        if not example.prompt:
            return self._text(example)
        prompt = self._ids(example.prompt)
        if example.candidates == ("",):  # nothing to train on: an answer is to be generated
            kept, cut = self._fit(tuple(prompt), 0, example, "the prompt is")
            return Encoded(kept, ((),), -1, cut, example.golds)
        if example.end is None:
            whole = [self._ids(example.prompt + text) for text in example.candidates]
        else:
            whole = [self._ended(example.prompt, text, example.end, example.where) for text in example.candidates]
        shared = min(_common_prefix(prompt, ids) for ids in whole)
        if shared == 0:
            raise InputError(f"{example.where}: the prompt has no token of its own before the answer")
        answers = tuple(tuple(ids[shared:]) for ids in whole)
        for text, answer in zip(example.candidates, answers, strict=True):
            if not answer:
                raise InputError(f"{example.where}: the answer {text!r} adds no token to the prompt")
        kept, cut = self._fit(tuple(prompt[:shared]), max(map(len, answers)), example, "prompt and answer are")
        label = -1 if example.label is None else example.label
        return Encoded(kept, answers, label, cut, example.golds, example.names, ended=example.end is not None)

    def _text(self, example: Example) -> Encoded:
        """Plain text: every token but the first counts, and the end of the text. What is too long loses its end."""
        limit = self.max_length or self.model_takes
        ids = self._marked(example.candidates[0]) or self._ids(example.candidates[0])
        if ids[-1] not in self.marks and self.tokenizer.eos_token_id is not None:
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
        return Encoded(tuple(ids[:1]), (tuple(ids[1:]),), 0, cut, ended=ids[-1] in self.marks)

    def _conversation(self, example: Example) -> Encoded:
        """The chat template's words; assistant turns count. What is too long loses its oldest turns, then the question's start."""
        asks, limit, longest = example.label is None, self.max_length or self.model_takes, 0
        ids: list[int] = []
        places: list[int] = []  # of what counts
        check_honoured(self.tokenizer, example.messages, example.where, example.template)
        for messages, learned in remaining(example.messages, example.learned):
            if asks:
                ids, places = question_ids(self.tokenizer, messages, example.where, example.template), []
            else:
                ids, places = conversation_ids(self.tokenizer, messages, learned, example.where, example.template)
            longest = longest or len(ids)
            if limit is None or len(ids) <= limit:
                break
            if self.max_length is None:
                raise InputError(
                    f"{example.where}: the conversation is {len(ids)} tokens, the model takes {limit}; shorten it, or cut its "
                    f"start with --max-length {limit}"
                )
        if limit is not None and (more := len(ids) - limit) > 0:
            question = question_places(self.tokenizer, messages, example.where, asks, example.template)
            if len(question) <= more:
                raise InputError(f"{example.where}: --max-length {limit} leaves no room for the question")
            ids = ids[: question[0]] + ids[question[0] + more :]
            places = [place - more if place > question[0] else place for place in places]
        cut = longest - len(ids)
        if asks:
            return Encoded(tuple(ids), ((),), -1, cut, example.golds)
        first = places[0]
        counted = tuple(place - first for place in places)
        answer = tuple(ids[first:])
        if len(counted) == len(answer):
            counted = ()
        ended = answer[-1] in self.marks
        return Encoded(tuple(ids[:first]), (answer,), 0, cut, example.golds, (), counted, ended=ended)

    def _filled(self, example: Example) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """The ids before the answer, those of each candidate in its place, and the ids behind it."""
        parts = example.prompt.replace(self.tokenizer.mask_token, MASK).split(MASK)
        if len(parts) > 2:
            raise InputError(f"{example.where}: the prompt has {len(parts) - 1} masks; one is wanted")
        before, after = parts if len(parts) == 2 else (example.prompt, ".")
        around: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        answers = []
        for candidate in example.candidates:
            word = candidate.strip() if len(parts) == 2 else candidate
            made, spans = self._encoded(before + word + after, spans=True)
            ids = tuple(made)
            text, end = before + word, len(before) + len(word)
            start = end - len(word.lstrip())
            start -= text[:start].endswith(
                " "
            )  # some tokenizers make the space before a word a token, or not, by the word
            inside = [i for i, (first, last) in enumerate(spans) if first < end and last > start and first < last]
            if not inside or spans[inside[-1]][1] > end or text[spans[inside[0]][0] : start].strip():
                raise InputError(f"{example.where}: the answer {word.strip()!r} shares a token with the text around it")
            answers.append(ids[inside[0] : inside[-1] + 1])
            around.add((ids[: inside[0]], ids[inside[-1] + 1 :]))
        if len(around) > 1:
            raise InputError(f"{example.where}: the text around the answer has other tokens beside another answer")
        prompt, tail = around.pop()
        return prompt, tuple(answers), tail

    def _fit(self, prompt: tuple[int, ...], more: int, example: Example, what: str) -> tuple[tuple[int, ...], int]:
        """The prompt, and how many tokens were cut where it does not fit with so many more: of the start of its longest field, or
        where no template tells one, or that is too short, of its own start."""
        limit = self.max_length or self.model_takes
        total = len(prompt) + more
        if limit is None or total <= limit:
            return prompt, 0
        if self.max_length is None:
            raise InputError(
                f"{example.where}: {what} {total} tokens, the model takes {limit}; "
                f"shorten the text, or cut its start with --max-length {limit}"
            )
        field = self._longest_field(example, prompt)
        if len(field) > total - limit:
            return prompt[: field[0]] + prompt[field[0] + total - limit :], total - limit
        room, head = limit - more, self._special_head(prompt)
        if room <= len(head):
            raise InputError(f"{example.where}: --max-length {limit} leaves no room for the prompt")
        return head + prompt[len(prompt) - room + len(head) :], total - limit

    def _longest_field(self, example: Example, prompt: tuple[int, ...]) -> list[int]:
        """Places in the prompt's ids of the tokens of the longest field that is within them."""
        if not example.fields or not self.tokenizer.is_fast:
            return []
        ids, spans = self._encoded(example.prompt, spans=True)
        found: list[int] = []
        for start, end in example.fields:
            places = places_within(example.prompt, spans, start, end)
            places = [place for place in places if place < len(prompt)]
            if places and tuple(ids[: places[-1] + 1]) == prompt[: places[-1] + 1]:
                found = max(found, places, key=len)
        return found

    def _ids(self, text: str) -> list[int]:
        """Ids with the tokenizer's own start (BOS, CLS), without the end that it adds (EOS, SEP): the answer follows."""
        ids, _ = self._encoded(text)
        return ids[: len(ids) - self.behind]

    def _encoded(self, text: str, spans: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids with all that the tokenizer adds, and their places in the text. A text that begins with the tokenizer's start itself,
        as templates of chats do, gets no second one."""
        made = self.tokenizer(text, verbose=False, **({"return_offsets_mapping": True} if spans else {}))
        ids, places = list(made["input_ids"]), list(made["offset_mapping"]) if spans else []
        n = self.before
        twice = n > 0 and ids[:n] == ids[n : 2 * n]
        return ids[n * twice :], places[n * twice :]

    def _marked(self, text: str) -> list[int] | None:
        """The ids of a text that ends itself, by a special token; white space behind that is left out."""
        if not (text := text.rstrip()).endswith(self.marks_texts):
            return None
        ids = self._ids(text)
        return ids if ids and ids[-1] in self.marks else None

    def _ended(self, prompt: str, answer: str, end: str, where: str) -> list[int]:
        """Ids of prompt and answer and its end."""
        if (marked := self._marked(prompt + answer)) is not None:
            if answer.strip() in self.marks_texts:
                raise InputError(f"{where}: the answer is {answer.strip()!r}, an end, and nothing before it")
            return marked
        if end:
            return self._ids(prompt + answer + ("" if answer.endswith(end) else end))
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                f"{where}: nothing ends the answer, since the tokenizer of --model has no end token; give the rows one of its "
                'special tokens behind their answers, or a task\'s file a line `end: "\\n"`'
            )
        return [*self._ids(prompt + answer), self.tokenizer.eos_token_id]

    def _special_head(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        starts = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        return ids[:1] if ids[0] in starts else ()


def _around(tokenizer: Any) -> tuple[int, int]:
    """How many tokens the tokenizer adds before a text, and behind it."""
    mask = tokenizer("a", return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
    before = next((i for i, added in enumerate(mask) if not added), len(mask))
    return before, next((i for i, added in enumerate(reversed(mask[before:])) if not added), 0)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass(frozen=True)
class Collator:
    """Encoded rows → one right-padded batch.

    Right padding comes after every token that a loss reads, so a causal model needs no mask and no position ids. The
    last answer token is not fed: nothing is predicted from it. The other kinds see all tokens, and get an attention_mask (S, T).

    multiple: T is rounded up to one of it, so that batches have few shapes.
    loss "answer": a sequence a row, prompt and right answer.
    loss "candidates": all candidates of all rows; where each is a single token they share one sequence, the prompt.

    The batch: input_ids (S, T); positions (S, K) of the hidden states that predict the answer's tokens, targets (S, K),
    target_mask (S, K); labels (B,); and `candidates` (B, C) ids, or `present` (B, C): S = B·C, and a row
    with fewer candidates than C repeats its first. A classifier's batch: input_ids, attention_mask, labels, and `outputs`
    (B, C) where the head's are not in the candidates' order.
    """

    loss: str
    pad_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        labels = torch.tensor([row.label for row in rows])
        if rows[0].classified:
            outputs = {"outputs": torch.tensor([row.outputs for row in rows])} if rows[0].outputs else {}
            return {**self._padded([row.prompt for row in rows], masked=True), "labels": labels, **outputs}
        if self.loss == "answer":
            pairs = [(row, row.candidates[row.label]) for row in rows]
            return {**self._sequences(pairs, [row.counted for row in rows]), "labels": labels}
        counts = [len(row.candidates) for row in rows]
        if len(set(counts)) == 1 and all(len(ids) == 1 for row in rows for ids in row.candidates):
            single = self._sequences([(row, row.candidates[0]) for row in rows])
            candidates = torch.tensor([[ids[0] for ids in row.candidates] for row in rows])
            return {**single, "candidates": candidates, "labels": labels}
        most = max(counts)  # rows stay together: S = B·C, so that each half of a doubled batch is a batch
        flat = [(row, (row.candidates + row.candidates[:1] * most)[c]) for row in rows for c in range(most)]
        present = torch.arange(most)[None, :] < torch.tensor(counts)[:, None]
        return {**self._sequences(flat), "present": present, "labels": labels}

    def _sequences(
        self, pairs: Sequence[tuple[Encoded, tuple[int, ...]]], counted: Sequence[tuple[int, ...]] = ()
    ) -> dict[str, Tensor]:
        """counted: the places in each answer that a loss reads; none named: all of it."""
        places = [list(where or range(len(answer))) for (_, answer), where in zip_longest(pairs, counted)]
        most = max(map(len, places))
        positions = torch.zeros((len(pairs), most), dtype=torch.long)
        targets = torch.zeros((len(pairs), most), dtype=torch.long)
        mask = torch.zeros((len(pairs), most), dtype=torch.bool)
        fed = []
        for s, (row, answer) in enumerate(pairs):
            k = len(places[s])
            # A causal model predicts a token at the one before it, a masked one at the token's own place.
            positions[s, :k] = torch.tensor(places[s]) + len(row.prompt) - int(row.mask is None)
            targets[s, :k] = torch.tensor(answer)[places[s]]
            mask[s, :k] = True
            fed.append(row.prompt + (answer[:-1] if row.mask is None else (row.mask,) * len(answer) + row.tail))
        padded = self._padded(fed, masked=pairs[0][0].mask is not None)
        return {**padded, "positions": positions, "targets": targets, "target_mask": mask}

    def _padded(self, sequences: Sequence[tuple[int, ...]], masked: bool) -> dict[str, Tensor]:
        length = -(-max(map(len, sequences)) // self.multiple) * self.multiple
        input_ids = torch.full((len(sequences), length), self.pad_id)
        for s, ids in enumerate(sequences):
            input_ids[s, : len(ids)] = torch.tensor(ids)
        if not masked:
            return {"input_ids": input_ids}
        lengths = torch.tensor([len(ids) for ids in sequences])
        return {"input_ids": input_ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}
