"""Numbers that are not finite: refused before something discrete, a label or a token, is made of them."""

from __future__ import annotations

import torch
from torch import nn

from zotune.errors import NotFinite
from zotune.models.quantized import base_dtype, inner_tensors

WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


def refuse_rows(model: nn.Module, bad: int, rows: int, what: str) -> None:
    """Raises NotFinite where `what` the model makes of any of the rows is not finite: how many, in which dtype, what to try."""
    if bad:
        raise NotFinite(
            f"{bad} of {rows} row{'s' * (rows != 1)}: {what} not finite in {_named(base_dtype(model))}; {_advice(model)}"
        )


def refuse_weights(model: nn.Module, where: str) -> None:
    """Raises NotFinite where the model has a weight that is no finite number. where: what the line begins with."""
    if (name := _first_bad(model)) is not None:
        dtype = base_dtype(model)
        wider = f"; try --dtype {WIDER[dtype]}" if dtype in WIDER else ""
        raise NotFinite(f"{where}: weights are not finite in {_named(dtype)} ({name} is the first){wider}")


def _advice(model: nn.Module) -> str:
    if (name := _first_bad(model)) is not None:
        wider = WIDER.get(base_dtype(model))
        unless = f"try --dtype {wider}, or fetch the model again" if wider else "fetch the model again"
        return f"its weights are not ({name} is the first): {unless}"
    if wider := WIDER.get(base_dtype(model)):
        return f"it overflows there: try --dtype {wider}"
    return "it overflows there: its weights are too large, or damaged; fetch the model again"


def _first_bad(model: nn.Module) -> str | None:
    for name, param in model.named_parameters():
        for inner in inner_tensors(param.detach()):
            wide = inner.float() if inner.is_floating_point() and inner.element_size() == 1 else inner
            if wide.is_floating_point() and not bool(torch.isfinite(wide.sum(dtype=torch.float64))):
                return name
    return None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
