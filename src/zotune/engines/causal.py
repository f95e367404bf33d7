"""Causal attention under capture as without.

transformers takes the capture of a CUDA graph for an export: lest it hold what depends on values, it makes a mask for attention
that is merely causal. That keeps torch from its fast kernels, copies keys and values to all heads that share them, and rounds
otherwise than the same step by the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from zotune.engines.following import capturing


@contextmanager
def as_without_capture() -> Iterator[None]:
    """A run without capture, and then its capture, take the same way.

    Two questions are answered otherwise while a graph is captured: whether rows without a padding mask need one, and whether rows
    are several sequences packed together, told by positions. The latter only where all rows have one row of positions, which no row
    of a batch can then alter, and where the run without capture has shown that they are not.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    plain_tracing, plain_find = (
        getattr(masking, name, None) for name in ("is_tracing", "find_packed_sequence_indices")
    )  # fmt: skip
    if plain_tracing is None or plain_find is None:
        yield
        return
    packed = False

    def tracing(tensor: Any = None) -> bool:
        return bool(plain_tracing(tensor)) and not (tensor is None and capturing())

    def find(position_ids: Tensor) -> Tensor | None:
        nonlocal packed
        shared = position_ids.dim() == 2 and len(position_ids) > 1 and position_ids.stride(0) == 0
        if shared and not packed and capturing():
            return None
        found: Tensor | None = plain_find(position_ids)
        packed = packed or (shared and found is not None)
        return found

    masking.is_tracing, masking.find_packed_sequence_indices = tracing, find
    try:
        yield
    finally:
        masking.is_tracing, masking.find_packed_sequence_indices = plain_tracing, plain_find
