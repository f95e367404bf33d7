"""Losses and predictions of a model on a batch, with logits only where they are needed."""

# S sequences, B rows, C candidates, T tokens, K answer positions, V vocabulary, H width.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    """Float32 logits (S, K, V) at the batch's positions; no key-value cache is built."""
    ids_ST = batch["input_ids"]
    with head_reads_only(model, batch["positions"], ids_ST.shape[1]):
        return model(**_inputs(batch)).logits.float()


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
    logits_SKV = answer_logits(model, batch)
    nll_SK = nn.functional.cross_entropy(logits_SKV.transpose(1, 2), batch["targets"], reduction="none")
    mask_SK = batch["target_mask"]
    return (nll_SK * mask_SK).sum(1) / mask_SK.sum(1)


def candidate_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, C) nats: each candidate's mean log-probability a token; −inf where a row has fewer candidates."""
    if "targets" not in batch:
        logits_BC: Tensor = model(**_inputs(batch)).logits
        return logits_BC.float().log_softmax(-1)
    if "candidates" in batch:
        logits_BV = answer_logits(model, batch)[:, 0]
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


@torch.inference_mode()
def score_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """The candidates' scores of each row, in the order given. Rows of like length share a batch."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    collate = Collator("candidates", pad_id)
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
    scores: list[list[float]] = [[] for _ in rows]
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            for i, row_scores in zip(chosen, candidate_scores(model, batch).tolist(), strict=True):
                scores[i] = row_scores[: len(rows[i].candidates)]
            advance(len(chosen))
    finally:
        model.train(was_training)
    return scores
