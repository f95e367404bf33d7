"""What a model gives for the rows of an evaluation: refused where it is no number, before a metric makes a label of it."""

# B rows, T tokens.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zotune.models.finite import refuse_rows


class Outputs:
    """Counts the rows of an evaluation, and those with outputs that are NaN or +inf, on the device that has them.

    A logit of −inf is what models give a class or a token that they rule out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.rows = model, 0
        self._bad: Tensor | None = None

    def look(self, outputs: Any, inputs: Any) -> None:
        """outputs: tensors (B, …) in tuples, lists or mappings. inputs: of which `attention_mask` (B, T) says what is padding."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        wrong = [_wrong(tensor, mask) for tensor in _tensors(outputs) if tensor.dim() and tensor.is_floating_point()]
        if not wrong:
            return
        rows = len(wrong[0])
        bad = torch.stack([each for each in wrong if len(each) == rows]).any(0).sum()
        self.rows += rows
        self._bad = bad if self._bad is None else self._bad + bad

    def refuse(self) -> None:
        """Raises NotFinite where there was one: how many, which dtype, what to try."""
        if self._bad is not None:
            refuse_rows(self.model, int(self._bad), self.rows, "outputs are")

    def before(self, metric: Callable[..., Any]) -> Callable[..., Any]:
        """The metric, which is not asked then."""

        def asked(*args: Any, **kwargs: Any) -> Any:
            self.refuse()
            return metric(*args, **kwargs)

        return asked


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _wrong(tensor: Tensor, mask: Any) -> Tensor:
    """(B,): whether a row has one that is no number, padding aside. By sums, which need no memory: −inf alone stays −inf in one."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    sums = tensor.flatten(2).sum(2, dtype=wide) if tensor.dim() > 2 else tensor.to(wide)
    wrong = sums.isnan() | sums.isposinf()
    if tensor.dim() > 2 and isinstance(mask, Tensor) and mask.shape == wrong.shape:
        wrong = wrong & mask.to(wrong.device, torch.bool)
    return wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
