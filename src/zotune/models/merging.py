"""An adapter's products added to the weights, and a check that what was written computes what base and adapter did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.engines.attended import hiding_nothing
from zotune.errors import InputError
from zotune.models.border import reading
from zotune.models.finite import refuse_weights
from zotune.models.ids import embedding_rows
from zotune.models.kinds import kind_of, without_adapter
from zotune.models.loading import length_limit
from zotune.models.quantized import base_dtype

# How far merged logits may lie from those of base and adapter, root mean square over that of the logits' own spread: what rounding
# the sums of weights to the dtype does, several times over. A merge that adds to a wrong weight is off by whole logits.
OFF = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
ROWS, TOKENS = 2, 8  # that it is checked on


@dataclass(frozen=True)
class Seen:
    """Some tokens, and a model's logits on them; how far its adapter moves these, root mean square."""

    ids: Tensor
    logits: Tensor
    moved: float

    def check(self, model: nn.Module, where: str) -> str | None:
        """Raises InputError where another model's are others than the rounding of its weights makes them. A line where that takes
        half of what the adapter does."""
        found, off = _logits(model, self.ids), OFF.get(base_dtype(model), 1e-1)
        spread = float((self.logits - self.logits.mean(-1, keepdim=True)).square().mean().sqrt())
        apart = (
            float((found - self.logits).square().mean().sqrt()) if found.shape == self.logits.shape else float("inf")
        )
        if not apart <= off * max(spread, 1e-6):  # nor where either is NaN
            raise InputError(
                f"{where}: merged, the model's outputs are {apart:.3g} off those with the adapter on it, which spread by "
                f"{spread:.3g}; nothing is written: use the adapter as it is (--adapter), or merge in --dtype float32"
            )
        if apart <= self.moved / 2:
            return None
        return (
            f"{where}: it changes the model's outputs by {self.moved:.3g}, and rounding the merged weights to their dtype by "
            f"{apart:.3g}: little of it is left; merge in --dtype float32, or use it as it is"
        )


def seen(model: Any) -> Seen:
    """The same tokens each time, of the model's vocabulary."""
    rows, config = embedding_rows(model) or 1, without_adapter(model).config
    tokens = min(TOKENS, length_limit(model) or TOKENS)
    ids = torch.randint(0, rows, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    if kind_of(model) == "classifier" and getattr(config, "is_encoder_decoder", False):
        ids = ids.masked_fill(ids == config.eos_token_id, (config.eos_token_id + 1) % rows)
        ids[:, -1] = config.eos_token_id  # which its head reads
    ids = ids.to(next(model.parameters()).device)
    logits = _logits(model, ids)
    with model.disable_adapter():
        moved = float((_logits(model, ids) - logits).square().mean().sqrt())
    return Seen(ids, logits, moved)


def merged(adapted: Any, where: str) -> Any:
    """The plain model. where: what an error begins with. Raises InputError for an adapter that no weights can hold."""
    _untie(adapted)
    with reading(where, said="cannot be merged: "):
        whole = adapted.merge_and_unload()
    refuse_weights(whole, f"{where}: merged")
    _say_whether_tied(whole)
    return whole


def _untie(adapted: Any) -> None:
    """An embedding that is the head too, where the adapter changes one of them, gets weights of its own first."""
    base: Any = without_adapter(adapted)
    modules = _ends(base)
    plain = [getattr(module, "base_layer", getattr(module, "original_module", module)) for module in modules]
    if len(plain) == 2 and plain != modules and plain[0].weight is plain[1].weight:
        for name, param in list(plain[1].named_parameters(recurse=False)):  # masked models tie the bias too
            setattr(plain[1], name, nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad))


def _ends(model: Any) -> list[Any]:
    """Embedding and output head, where there are both."""
    ends = [getattr(model, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output")]
    return ends if all(hasattr(end, "weight") for end in ends) else []


def _say_whether_tied(model: Any) -> None:
    """In the config, which decides what is saved and how it is loaded."""
    if not (ends := _ends(model)):
        return
    tied = ends[0].weight is ends[1].weight
    for config in (model.config, getattr(model.config, "text_config", None)):
        if config is not None and bool(getattr(config, "tie_word_embeddings", False)) != tied:
            config.tie_word_embeddings = tied


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    with hiding_nothing(model.parameters()):
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.double()
