"""A captured forward masks what one without capture masks."""

from __future__ import annotations

import families
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from zotune.engines import causal

ATTENTION = torch.nn.functional.scaled_dot_product_attention


class Watched(TorchFunctionMode):
    """Whether attention was given a mask."""

    def __init__(self):
        self.masked = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is ATTENTION:
            self.masked.add((kwargs or {}).get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def forward(monkeypatch):
    """A forward's logits, and whether its attention had masks; capture: as if a graph were being captured."""
    model, now = families.build("llama"), [False]
    monkeypatch.setattr(causal, "capturing", lambda: now[0])
    plain = masking_utils.is_tracing
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: now[0] or plain(tensor))

    def run(capture, **given):
        now[0] = capture
        with torch.no_grad(), Watched() as watched:
            logits = model(input_ids=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), use_cache=False, **given).logits
        return logits, watched.masked

    return run


def test_a_capture_makes_no_mask_where_none_is_needed(forward):
    assert forward(True)[1] == {True}  # what transformers does by itself
    with causal.as_without_capture():
        wanted, without = forward(False)
        found, captured = forward(True)
    assert without == captured == {False}
    assert torch.equal(found, wanted)
    assert forward(True)[1] == {True}


@pytest.mark.parametrize("rows", ["all", "each"])
def test_packed_rows_keep_their_mask(forward, rows):
    ids = torch.tensor([[0, 1, 0, 1]])
    ids = ids.expand(2, -1) if rows == "all" else torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    with causal.as_without_capture():
        wanted, without = forward(False, position_ids=ids)
        found, captured = forward(True, position_ids=ids)
    assert without == captured == {True}
    assert torch.equal(found, wanted)


def test_rows_with_positions_of_their_own_keep_the_mask_that_later_ones_may_need(forward):
    ids = torch.arange(4).repeat(2, 1)  # another batch's, at the next replay, may be packed
    with causal.as_without_capture():
        assert forward(False, position_ids=ids)[1] == {False}
        assert forward(True, position_ids=ids)[1] == {True}


def test_padding_keeps_its_mask(forward):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with causal.as_without_capture():
        wanted, without = forward(False, attention_mask=mask)
        found, captured = forward(True, attention_mask=mask)
    assert without == captured == {True}
    assert torch.equal(found, wanted)
