"""Answers that a model writes: greedy, in batches, up to the end of the line."""

# B rows, T tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from zotune.tasks.encoding import Encoded

MOST_TOKENS = 50


@torch.inference_mode()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    most: int = MOST_TOKENS,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """What the model writes after each prompt, in the order given: at most so many tokens, cut at the first line's end.

    Prompts are padded on the left, with a mask; rows of like length share a batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    answers = [""] * len(rows)
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            longest = max(len(rows[i].prompt) for i in chosen)
            ids_BT = torch.full((len(chosen), longest), pad_id)
            mask_BT = torch.zeros_like(ids_BT)
            for b, i in enumerate(chosen):
                ids_BT[b, longest - len(rows[i].prompt) :] = torch.tensor(rows[i].prompt)
                mask_BT[b, longest - len(rows[i].prompt) :] = 1
            generate: Any = model.generate
            written = generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                max_new_tokens=most,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad_id,
            )
            for i, ids in zip(chosen, written.tolist(), strict=True):
                text = tokenizer.decode(ids[longest:], skip_special_tokens=True)
                answers[i] = text.strip().split("\n")[0].strip()
            advance(len(chosen))
    finally:
        model.train(was_training)
    return answers
