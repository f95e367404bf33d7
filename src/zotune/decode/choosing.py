"""Which token comes next: the likeliest, or one that is drawn, by draws that all members of a step share.

    argmax_i (ℓ_i/T + G_i),  G_i = −log(−log Φ(z_i))

draws token i with probability softmax(ℓ/T)_i (Gumbel, 1954), since Φ(z) of a standard normal z is uniform. The noise belongs to the
token, not to its place in an order of all, so a member whose logits differ little mostly draws what its neighbour draws.
"""

# S slots (rows of logits), V vocabulary, R prompt rows, K positions in an answer.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.decode.asking import Settings
from zotune.noise.reference import words


def draw_seeds(seed: int, step: int, rows_R: Sequence[int], positions: int, device: Any = "cpu") -> Tensor:
    """(R, K) int64: the bit pattern of the seed of each token's draw.

    The first two words of Philox at counter (position in the answer, prompt row, step, SAMPLE), key seed. rows, step: below 2³¹.
    """
    at_RK = torch.tensor(rows_R, dtype=torch.int64)[:, None] << 32 | torch.arange(positions)
    words_RK4 = words(at_RK.flatten(), seed, step, noise.Stream.SAMPLE)
    return (words_RK4[:, 0] | words_RK4[:, 1] << 32).view(at_RK.shape).to(device)


class Draws:
    """The noise of rows of logits. gumbel_SV: float32, a buffer of theirs that is used again."""

    def __init__(self, gumbel_SV: Tensor) -> None:
        self.gumbel_SV = gumbel_SV
        self._ones = torch.ones(1, len(gumbel_SV), 1, device=gumbel_SV.device)
        self._many = noise.Many([noise.Item(self.gumbel_SV, None, 0)], "gaussian")

    def draw(self, seeds_S: Tensor) -> Tensor:
        """(S, V) float32: G of each row's seed."""
        self._many.draw(seeds_S[:, None].contiguous(), self._ones)
        return torch.special.log_ndtr(self.gumbel_SV, out=self.gumbel_SV).neg_().log_().neg_()


def choose(logits_SV: Tensor, settings: Settings, gumbel_SV: Tensor | None = None) -> Tensor:
    """(S,) int64: the next token of each row. gumbel_SV: of the draws, where the temperature is over 0."""
    if settings.temperature == 0:
        return logits_SV.argmax(-1)
    assert gumbel_SV is not None
    wide = torch.float64 if logits_SV.dtype == torch.float64 else torch.float32
    scores_SV = logits_SV.to(wide) / settings.temperature
    if settings.top_k is not None:
        least_S1 = scores_SV.topk(min(settings.top_k, scores_SV.shape[1]), -1).values[:, -1:]
        scores_SV = scores_SV.masked_fill(scores_SV < least_S1, float("-inf"))
    if settings.top_p is not None and settings.top_p < 1:
        sorted_SV, order_SV = scores_SV.sort(-1, descending=True)
        shares_SV = sorted_SV.softmax(-1)
        beyond_SV = shares_SV.cumsum(-1) - shares_SV >= settings.top_p  # the likelier ones have p without it
        scores_SV = scores_SV.masked_fill(torch.empty_like(beyond_SV).scatter_(1, order_SV, beyond_SV), float("-inf"))
    return (scores_SV + gumbel_SV).argmax(-1)
