"""What every run has before its first step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from zotune.models.ids import pad_id
from zotune.options import RunOptions
from zotune.tasks.rows import BadRows


class Asked(Protocol):
    """What a run is on, as its record and its choice of a step know it: a task, or prompts with a reward."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def labels(self) -> list[str]: ...


@dataclass(kw_only=True)
class Ready:
    """A model with its scheme on, and what it is to do.

    base: fingerprint of the model as it was loaded. ends: the tokens that end the answers that are trained. made_of: rows,
    tokenizer, template and task by content; see `identity`. unread: a line on files that are no split's.
    """

    config: RunOptions
    task: Asked
    model: nn.Module
    tokenizer: Any
    bad: BadRows
    unread: str | None = None
    base: str = ""
    ends: list[int] = field(default_factory=list)
    made_of: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer, self.model)
