"""What the linear maps of a model are given by each row of a batch: the unit vectors v of directions u·vᵀ that know their row.

A map's input of a row is taken at θ, at the token whose logits give the answer: the last of the batch's `positions` (S, K),
where it has those; else the last token that its attention mask counts; else the last of all. Of a row with several sequences
(candidates that are texts) it is their mean.
"""

# N rows of a step, B of a batch, S sequences of it (those of a row follow each other), T tokens, K positions, D wide.

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zotune.directions import Directions
from zotune.engines.reads import reads_no_values, same_draws

_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")


class AnswerTokens:
    """Where each sequence of a batch has the token whose logits give its answer."""

    def __init__(self, batch: Any, rows: int) -> None:
        self.rows, self._sequences, self._tokens = rows, rows, 0
        self._at_S: Tensor | None = None  # of T tokens
        self._among_S: Tensor | None = None  # of K positions
        held = {k: t for k, t in batch.items() if isinstance(t, Tensor)} if isinstance(batch, Mapping) else {}
        text = next((held[k] for k in ("input_ids", "inputs_embeds", "attention_mask") if k in held), None)
        if text is None or text.dim() < 2 or len(text) % rows:
            return
        self._sequences, self._tokens = text.shape[:2]
        positions, mask = held.get("positions"), held.get("attention_mask")
        if positions is not None and positions.dim() == 2 and len(positions) == self._sequences:
            self._at_S, self._among_S = positions.amax(1), positions.argmax(1)
            self._positions = positions.shape[1]
        elif mask is not None and mask.shape == text.shape[:2]:
            self._at_S = (mask.ne(0) * torch.arange(self._tokens, device=mask.device)).amax(1)

    def of(self, x: Tensor) -> Tensor | None:
        """(B, D): each row's x (S, …, D), or (S·T, D), there, in float32 or wider; None where x does not have its rows so.

        Virtual tokens stand before the others. An x of fewer tokens is of the positions alone, or its last is taken.
        """
        if x.dim() < 2 or x.shape[0] == 0 or x.shape[0] % self._sequences:
            return None
        x_STD = x.detach().reshape(self._sequences, -1, x.shape[-1])
        at_S, tokens = None, x_STD.shape[1]
        if self._at_S is not None and tokens >= self._tokens:
            at_S = self._at_S + (tokens - self._tokens)
        elif self._among_S is not None and tokens == self._positions:
            at_S = self._among_S
        x_SD = x_STD[:, -1] if at_S is None else x_STD.take_along_dim(at_S.view(-1, 1, 1), 1)[:, 0]
        wide = x_SD if x.dtype == torch.float64 else x_SD.float()
        return wide.view(self.rows, -1, x.shape[-1]).mean(1)


class InputVectors:
    """v (N, D, 1) of each map for the rows of a step: x/‖x‖ in the map's dtype, zeros where x is nothing or not finite.

    Maps: the trainable parameters that a first forward reads as linear maps of the batch (`linear`, or `addmm` as GPT-2 does)
    and in no other way, of the model's numbered layers; where none of those trains (scheme head), all such. Memory: N·D a map.
    """

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        self.maps: list[torch.nn.Parameter] = []
        self.side: dict[int, int] = {}  # of the map that takes x: 1 of W (O, D), 0 of W (D, O)
        self.rows = 0  # N
        self._held: dict[int, dict[int, Tensor]] = {}  # by N: graphs hold where they are
        self._of_batch = slice(0)

    @property
    def of_step(self) -> dict[int, Tensor]:
        """(N, D, 1) by map, of the step's batches so far."""
        return self._held[self.rows]

    def of_batch(self, param: Tensor) -> Tensor:
        """(B, D, 1), of the batch looked at last."""
        return self.of_step[id(param)][self._of_batch]

    def look(self, loss: Callable[[], Any], answers: AnswerTokens, first: int, rows_of_step: int) -> None:
        """One forward at θ. The batch's rows are first, first + 1, … of the step's."""
        redraw = same_draws(self._directions.params)
        with torch.no_grad(), InputReads(self._directions, lambda weight, side, x: answers.of(x)) as mode:
            loss()
        redraw()  # the places see the same dropout
        if not self.maps:
            self._choose(mode)
        self.rows, self._of_batch = rows_of_step, slice(first, first + answers.rows)
        if rows_of_step not in self._held:
            self._held[rows_of_step] = {
                id(p): p.data.new_zeros(rows_of_step, p.shape[self.side[id(p)]], 1) for p in self.maps
            }
        for param in self.maps:
            v_BD, (side, x_BD) = self.of_batch(param)[..., 0], mode.found.get(id(param), (0, None))
            if x_BD is None or side != self.side[id(param)]:
                v_BD.zero_()
            else:
                length_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
                v_BD.copy_((x_BD / length_B1.clamp_min(torch.finfo(x_BD.dtype).tiny)).nan_to_num(0, 0, 0))

    def _choose(self, mode: InputReads) -> None:
        self.side = mode.maps()
        self.maps += [p for p in self._directions.params if id(p) in self.side]


class Tokens:
    """All tokens of a batch that its attention mask counts."""

    def __init__(self, batch: Any) -> None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._counted = mask.ne(0).flatten() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def of(self, x: Tensor) -> Tensor | None:
        """(n, D): their x (…, D), in float32 or wider; all of an x of another number of tokens. None where x is a vector."""
        if x.dim() < 2 or x.numel() == 0:
            return None
        x_nD = x.detach().reshape(-1, x.shape[-1])
        if self._counted is not None and len(self._counted) == len(x_nD):
            x_nD = x_nD[self._counted]
        return x_nD if x.dtype == torch.float64 else x_nD.float()


def read_inputs(
    directions: Directions,
    loss: Callable[[Any], Any],
    batch: Any,
    see: Callable[[Any, int, Tensor, Tokens], bool],
) -> dict[int, int]:
    """One forward at θ, in which `see` is given each matrix that is read as a linear map, the side that takes x, and x.

    Returns the side of each map, as `InputReads.maps` chooses them.
    """
    tokens, redraw = Tokens(batch), same_draws(directions.params)
    with (
        torch.no_grad(),
        InputReads(directions, lambda weight, side, x: see(weight, side, x, tokens) or None) as mode,
    ):
        loss(batch)
    redraw()
    return mode.maps()


class InputReads(TorchFunctionMode):
    """found: of each matrix that linear maps are made with, which side takes x, and what `see` made of its x, as read last.

    see: (weight, side, x) → what is wanted of them; None where x is nothing that it knows.
    """

    def __init__(self, directions: Directions, see: Callable[[Any, int, Tensor], Any]) -> None:
        super().__init__()
        self._directions, self._slots, self._see = directions, directions.slots, see
        self.found: dict[int, tuple[int, Any]] = {}
        self.otherwise: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("input", "weight")))
            self._look(x, weight, 1)
        elif func is torch.addmm and not kwargs:
            self._look(args[1], args[2], 0)
        elif not reads_no_values(func):
            self.otherwise |= {id(a) for a in (*args, *kwargs.values()) if id(a) in self._slots}
        return func(*args, **kwargs)

    def _look(self, x: Any, weight: Any, side: int) -> None:
        if id(weight) in self._slots and weight.dim() == 2 and (seen := self._see(weight, side, x)) is not None:
            self.found[id(weight)] = side, seen

    def maps(self) -> dict[int, int]:
        """The side that takes x of each trainable map that is read in no other way; of the model's layers, where those train."""
        maps = [p for p in self._directions.params if id(p) in self.found and id(p) not in self.otherwise]
        maps = [p for p in maps if _IN_A_LAYER.search(self._slots[id(p)].name)] or maps
        if not maps:
            raise ValueError(
                "directions from the rows' own inputs: nothing that trains is read as a linear map of the batch "
                "(torch's linear, or addmm as in GPT-2); use --scheme full, lora or head, or another method"
            )
        return {id(p): self.found[id(p)][0] for p in maps}
