"""Where an answer ends: one notion for every form of rows, so that what is trained is what stops.

An answer ends in a token: the one that the row writes itself (`Paris<|im_end|>`), the mark that a chat template writes behind a
turn, or the tokenizer's own end. Of a task with an end of its own (`end: "\n"`) it ends in that text. What a run trains on is put
into the model's `generation_config`, which stops whoever generates with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria

from zotune.decode.plain import only
from zotune.models.border import reading
from zotune.models.kinds import without_adapter

if TYPE_CHECKING:
    from zotune.tasks.encoding import Encoded


def marks(tokenizer: Any) -> frozenset[int]:
    """The special tokens that may end an answer: all but those that begin a text or stand in for one."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    others = {tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id}
    return frozenset(special - others | {tokenizer.eos_token_id} - {None})


def taught(rows: Iterable[Encoded], tokenizer: Any, end: str | None = None) -> set[int]:
    """The tokens that end the rows' right answers. Of a text that ends them those that hold the whole of it."""
    last = {row.candidates[row.label][-1] for row in rows if row.ended}
    special = marks(tokenizer)
    return {i for i in last if i in special or (end and end in tokenizer.decode([i]))}


def of(model: nn.Module) -> set[int]:
    """The tokens that end what the model generates, by its own configuration."""
    config = getattr(without_adapter(model), "generation_config", None)
    ids = config.eos_token_id if config is not None else None
    return set(ids) if isinstance(ids, (list, tuple)) else set() if ids is None else {int(ids)}


def teach(model: nn.Module, ends: Iterable[int]) -> None:
    """From now on these tokens end what the model generates too. Saved with it, as generation_config.json."""
    base: Any = without_adapter(model)
    ends = list(ends)
    if ends and (all_ends := sorted(of(model) | {*ends})):
        base.generation_config = base.generation_config or GenerationConfig()
        base.generation_config.eos_token_id = all_ends if len(all_ends) > 1 else all_ends[0]


def save_beside_adapter(model: nn.Module, folder: Path) -> None:
    """The generation_config of an adapter's model, which PEFT does not save."""
    base: Any = without_adapter(model)
    if base is not model and getattr(base, "generation_config", None) is not None and of(model):
        GenerationConfig(eos_token_id=base.generation_config.eos_token_id).save_pretrained(folder)


def take_from_adapter(model: nn.Module, folder: str | Path) -> None:
    """What ended the answers that an adapter was trained on ends the model's, if its folder says so."""
    folder = Path(folder).expanduser()
    if (folder / "generation_config.json").is_file():
        with reading(f"--adapter {folder}", folder / "generation_config.json"):
            ids = GenerationConfig.from_pretrained(folder).eos_token_id
        teach(model, ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])


def take_from_record(model: nn.Module, extra: Mapping[str, Any]) -> None:
    """The same of a trajectory's header, of whose words only numbers of tokens are taken."""
    ends = extra.get("ends")
    if isinstance(ends, list) and all(type(end) is int and end >= 0 for end in ends):
        teach(model, ends)


class Until(StoppingCriteria):
    """Stops a row once what was written behind its prompt holds the text."""

    def __init__(self, text: str, tokenizer: Any, prompt_tokens: int) -> None:
        self.text, self.tokenizer, self.first = text, tokenizer, prompt_tokens
        self.window = len(text.encode())  # a token holds a byte at least, so no more of the last ones can hold its end

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        newest = input_ids[:, max(self.first, input_ids.shape[1] - self.window) :].tolist()
        found = [self.text in self.tokenizer.decode(ids) for ids in newest]
        return torch.tensor(found, device=input_ids.device)


@contextmanager
def greedy(model: nn.Module, pad_id: int, most: int, ends: Iterable[int]) -> Iterator[None]:
    """The likeliest token each time, up to one of the ends, whatever else the checkpoint asks for (penalties, beams, lengths)."""
    config = GenerationConfig(
        eos_token_id=sorted(ends) or None, pad_token_id=pad_id, max_new_tokens=most, do_sample=False
    )
    with only(model, config):
        yield
