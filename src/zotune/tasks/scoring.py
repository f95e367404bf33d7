"""Losses and predictions of a model on a batch, with logits only where they are needed."""

# S sequences, B rows, C candidates, T tokens, K answer positions, V vocabulary, H width.

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.models.finite import refuse_rows
from zotune.tasks.encoding import Collator, Encoded


@contextmanager
def head_reads_only(model: nn.Module, positions_SK: Tensor, tokens: int) -> Iterator[None]:
    """Inside, the output head sees the hidden states at these positions alone, and so gives logits (S, K, V).

    tokens: T of the input. A scheme that puts virtual tokens before the input shifts the positions by as many.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_STH = args[0]
        at_SK = positions_SK + (hidden_STH.shape[1] - tokens)
        rows_S1 = torch.arange(hidden_STH.shape[0], device=hidden_STH.device)[:, None]
        return (hidden_STH[rows_S1, at_SK], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits (S, K, V) at the batch's positions, in the model's dtype; no key-value cache is built."""
    ids_ST = batch["input_ids"]
    with head_reads_only(model, batch["positions"], ids_ST.shape[1]):
        logits_SKV: Tensor = model(**_inputs(batch)).logits
    return logits_SKV


NLL_BYTES = 32 << 20  # of float32 logits at a time, where nothing is kept for a backward pass


def token_nll(logits_SKV: Tensor, targets_SK: Tensor) -> Tensor:
    """(S, K) nats: −log p of each target, in float32; a target of −100 has 0.

    What it takes besides the logits are some rows of their size, not copies of all of them: with many answer tokens those would be
    the peak of a step.
    """
    logits_NV, targets_N = logits_SKV.flatten(0, 1), targets_SK.flatten()
    rows = len(logits_NV) if torch.is_grad_enabled() else max(1, NLL_BYTES // (4 * logits_NV.shape[1]))
    parts = zip(logits_NV.split(rows), targets_N.split(rows), strict=True)
    nll_N = [nn.functional.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in parts]
    return (nll_N[0] if len(nll_N) == 1 else torch.cat(nll_N)).view(targets_SK.shape)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the forward is given. Only causal models have a cache to do without; their batches need no mask."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return given if "attention_mask" in batch else given | {"use_cache": False}


def answer_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(S,) nats: the mean over a sequence's answer tokens of −log p(token | what precedes it, or surrounds it: masked models).

    Of a classifier: −log p of the label.
    """
    if "targets" not in batch:
        return candidate_losses(model, batch)
    nll_SK = token_nll(answer_logits(model, batch), batch["targets"])
    mask_SK = batch["target_mask"]
    return (nll_SK * mask_SK).sum(1) / mask_SK.sum(1)


def candidate_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, C) nats: each candidate's mean log-probability a token; −inf where a row has fewer candidates."""
    if "targets" not in batch:
        logits_BC: Tensor = model(**_inputs(batch)).logits
        scores_BC = logits_BC.float().log_softmax(-1)
        return scores_BC.gather(1, batch["outputs"]) if "outputs" in batch else scores_BC
    if "candidates" in batch:
        logits_BV = answer_logits(model, batch)[:, 0].float()
        return logits_BV.log_softmax(-1).gather(1, batch["candidates"])
    scores_S = -answer_losses(model, batch)
    present_BC = batch["present"]
    return scores_S.view(present_BC.shape).masked_fill(~present_BC, float("-inf"))


def candidate_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B,) nats: cross-entropy over the candidates' scores."""
    return nn.functional.cross_entropy(candidate_scores(model, batch), batch["labels"], reduction="none")


ROW_LOSSES: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], Tensor]] = {
    "answer": answer_losses,
    "candidates": candidate_losses,
}


def score_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """The candidates' scores of each row, in the order given. Where that pays, a row's prompt is read once for all of them.

    Raises NotFinite where any is not: the best of them would be the first, or last, label.
    """
    alone = [i for i, row in enumerate(rows) if _shares(model, row)]
    others = [i for i in range(len(rows)) if i not in set(alone)]
    scores = _by_batch(
        model, [rows[i] for i in others], candidate_scores, Collator("candidates", pad_id), batch_size, advance
    )
    found = {i: of_row[: len(rows[i].candidates)] for i, of_row in zip(others, scores, strict=True)}
    for i in alone:
        found[i] = shared_scores(model, rows[i], batch_size=batch_size, pad_id=pad_id)
        advance(1)
    refuse_rows(model, sum(not all(map(math.isfinite, s)) for s in found.values()), len(rows), "scores are")
    return [found[i] for i in range(len(rows))]


# Tokens that a row's candidates would repeat, from which on they are read once instead: measured on the CPU (docs/log.md). Not
# done elsewhere, where rows one at a time cost launches and it has not been measured.
SHARED_TOKENS = 64


def _shares(model: nn.Module, row: Encoded) -> bool:
    """Whether the prompt is to be read once: it is long, and the model has a cache that is its own."""
    if (len(row.candidates) - 1) * len(row.prompt) < SHARED_TOKENS or max(map(len, row.candidates)) == 1:
        return False
    if next(model.parameters()).device.type != "cpu" or row.mask is not None or row.classified:
        return False
    can_generate: Any = getattr(model, "can_generate", lambda: False)
    learned = getattr(
        getattr(model, "active_peft_config", None), "is_prompt_learning", False
    )  # takes the cache's place
    return bool(can_generate()) and not learned and not getattr(model, "_is_stateful", False)


@torch.inference_mode()
def shared_scores(model: nn.Module, row: Encoded, *, batch_size: int, pad_id: int) -> list[float]:
    """(C,) nats: the candidates' scores of one row. The prompt is read once; its keys and values serve every candidate."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        prompt_1T = torch.tensor([row.prompt], device=device)
        last_11 = torch.full((1, 1), len(row.prompt) - 1, device=device)
        with head_reads_only(model, last_11, len(row.prompt)):
            read = model(input_ids=prompt_1T, use_cache=True)
        first_V = read.logits[0, 0].float().log_softmax(-1)
        scores: list[float] = []
        for start in range(0, len(row.candidates), batch_size):
            answers = row.candidates[start : start + batch_size]
            ids_CK = _padded([ids[:-1] for ids in answers], pad_id, device)
            targets_CK = _padded([ids[1:] for ids in answers], -100, device)
            cache = copy.deepcopy(read.past_key_values)  # it grows as it is used
            cache.batch_repeat_interleave(len(answers))
            nll_CK = token_nll(model(input_ids=ids_CK, past_key_values=cache, use_cache=True).logits, targets_CK)
            firsts_C = first_V[torch.tensor([ids[0] for ids in answers], device=device)]
            lengths_C = torch.tensor([len(ids) for ids in answers], device=device)
            scores += ((firsts_C - nll_CK.sum(1)) / lengths_C).tolist()
        return scores
    finally:
        model.train(was_training)


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """Ids padded on the right, at least one column."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in rows], device=device)


def row_losses(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[float]:
    """Nats: the mean of −log p over each row's tokens that count, in the order given. Raises NotFinite where any is not."""
    losses = _by_batch(model, rows, answer_losses, Collator("answer", pad_id), batch_size, advance)
    refuse_rows(model, sum(not math.isfinite(loss) for loss in losses), len(rows), "losses are")
    return losses


@torch.inference_mode()
def _by_batch(
    model: nn.Module,
    rows: Sequence[Encoded],
    of_batch: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    collate: Collator,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[Any]:
    """What a function of batches gives for each row, in the order given. Rows of like length share a batch."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
    found: list[Any] = [None for _ in rows]
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            for i, of_row in zip(chosen, of_batch(model, batch).tolist(), strict=True):
                found[i] = of_row
            advance(len(chosen))
    finally:
        model.train(was_training)
    return found
