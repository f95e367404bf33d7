"""The options that change what a step perturbs: sparse directions, one block at a time, the shallow layers alone. Loads no torch.

Source: arXiv 2402.11592, section 5 (block-wise descent, hybrid training, gradient sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from zotune.errors import OptionError, nearest

MASKS = ("random", "magnitude", "wanda")
SCOPES = ("layer", "global")
BLOCKS = ("transformer", "attention-mlp", "linear")
UPDATES = ("gauss-seidel", "jacobi")
CHOICES = {"mask": MASKS, "sparsity_scope": SCOPES, "blocks": BLOCKS, "block_update": UPDATES}
MEANT_BY = {
    "mask": "sparsity",
    "sparsity_scope": "sparsity",
    "mask_refresh": "sparsity",
    "block_update": "blocks",
    "fo_lr": "hybrid",
}


@dataclass(frozen=True)
class Enhancements:
    """sparsity: the fraction of elements that a step leaves out, of its probes and its update alike. mask: which: "random" ones,
        those of least "magnitude", or those of least weight times input, "wanda". sparsity_scope: the fraction of each
        tensor ("layer"; of each output with wanda), or of all weights together ("global"), where a tensor's own
        fraction is its share of the smallest. mask_refresh: steps until a mask is drawn anew; None keeps the first.
    blocks: descend one block after another, each step all of them: "transformer" (embeddings, each layer, the rest),
        "attention-mlp" (each layer in two), "linear" (each module that owns parameters). block_update: "gauss-seidel" moves a
        block before the next is probed, "jacobi" all at the end.
    hybrid: the fraction of the layers, from the input on, that train by the method; the others by back-propagation, at fo_lr.
    g_clip: bound on |g| of each direction.
    """

    sparsity: float | None = None
    mask: str | None = None
    sparsity_scope: str | None = None
    mask_refresh: int | None = None
    blocks: str | None = None
    block_update: str | None = None
    hybrid: float | None = None
    fo_lr: float | None = None
    g_clip: float | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise OptionError(name, f"unknown {name} {value!r}; {nearest(str(value), choices)}")
        self._check("sparsity", self.sparsity is None or 0 <= self.sparsity < 1, "at least 0 and under 1")
        self._check("mask_refresh", self.mask_refresh is None or self.mask_refresh >= 1, "a number of steps from 1")
        self._check("hybrid", self.hybrid is None or 0 < self.hybrid < 1, "a fraction of the layers, between 0 and 1")
        self._check("fo_lr", self.fo_lr is None or self.fo_lr >= 0, "at least 0")
        self._check("g_clip", self.g_clip is None or self.g_clip > 0, "above 0")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise OptionError(name, f"{name}={getattr(self, name)!r}: must be {wanted}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @property
    def meaningless(self) -> str:
        """The first option that is given without the one that it is of (`MEANT_BY`), or ""."""
        missing = (
            name for name, of in MEANT_BY.items() if getattr(self, of) is None and getattr(self, name) is not None
        )
        return next(missing, "")

    @property
    def sequential(self) -> bool:
        """Whether they need the engine that perturbs any set of weights by any direction."""
        return self.sparsity is not None or self.blocks is not None or self.hybrid is not None
