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
        for name, of, choices in (
            ("mask", "sparsity", MASKS),
            ("sparsity_scope", "sparsity", SCOPES),
            ("blocks", None, BLOCKS),
            ("block_update", "blocks", UPDATES),
            ("mask_refresh", "sparsity", None),
            ("fo_lr", "hybrid", None),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if choices and value not in choices:
                raise OptionError(name, f"unknown {name} {value!r}; {nearest(str(value), choices)}")
            if of and getattr(self, of) is None:
                raise OptionError(name, f"{name}={value!r}: means nothing without {of}")
        self._check("sparsity", self.sparsity is None or 0 <= self.sparsity < 1, "at least 0 and under 1")
        self._check("mask_refresh", self.mask_refresh is None or self.mask_refresh >= 1, "a number of steps from 1")
        self._check("hybrid", self.hybrid is None or 0 < self.hybrid < 1, "a fraction of the layers, between 0 and 1")
        self._check("fo_lr", self.fo_lr is None or self.fo_lr >= 0, "at least 0")
        self._check("g_clip", self.g_clip is None or self.g_clip > 0, "above 0")
        if self.hybrid is not None and self.fo_lr is None:
            raise OptionError(
                "hybrid", "hybrid: needs fo_lr, the learning rate of the layers that back-propagation trains"
            )
        if self.hybrid is not None and self.blocks is not None:
            raise OptionError("hybrid", "hybrid and blocks: choose one; both say which layers a probe perturbs")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise OptionError(name, f"{name}={getattr(self, name)!r}: must be {wanted}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @property
    def sequential(self) -> bool:
        """Whether they need the engine that perturbs any set of weights by any direction."""
        return self.sparsity is not None or self.blocks is not None or self.hybrid is not None
