"""A step's options: what each may be, and what does not go together, in one table. Loads no torch.

The optimizer, the command line and the estimates ask it; whoever shows a message writes the option's name as its users know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

from zotune.errors import OptionError, nearest
from zotune.methods import Method
from zotune.step.enhancements import MEANT_BY, Enhancements

DIRECTIONS = ("gaussian", "rademacher")
ROUNDINGS = ("nearest", "compensated")
AUTO = "auto"  # for lr: the run finds it (`zotune.step.rates`)


@dataclass(frozen=True)
class Choices:
    """The options of a step, checked one by one as they come: a wrong value raises `OptionError`.

    name: of the method, for messages. scheme: what trains, where that is known.
    """

    method: Method
    name: str = "zo-sgd"
    seed: Any = 0
    direction: str | None = None
    groups: Any = 1
    engine: str = "auto"
    rank: int = 1
    fold_every: int = 1
    rounding: str = "nearest"
    forward_tokens: int | None = None
    lr: Any = 0.0
    eps: Any = 1e-3
    weight_decay: Any = 0.0
    max_skipped: int = 5
    enhancements: Enhancements = field(default_factory=Enhancements)
    scheme: str = "full"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        check_rates(vars(self))
        whole = isinstance(self.seed, Integral) and not isinstance(self.seed, bool)
        self._check("seed", whole and 0 <= self.seed < 2**64, "a whole number from 0 to 2**64 - 1")
        for name in ("max_skipped", "rank", "fold_every"):
            self._check(name, is_count(getattr(self, name)), "a whole number from 1")
        for name in ("forward_tokens", "micro_batch"):
            self._check(name, getattr(self, name) is None or is_count(getattr(self, name)), "a whole number from 1")
        if isinstance(self.groups, str) and self.groups.isdecimal():
            object.__setattr__(self, "groups", int(self.groups))
        counted = isinstance(self.groups, int) and not isinstance(self.groups, bool) and self.groups >= 1
        self._check("groups", self.groups == "batch" or counted, "a number from 1 or 'batch'")
        for name, known in (("direction", DIRECTIONS), ("rounding", ROUNDINGS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise OptionError(name, f"unknown {name} {value!r}; {nearest(str(value), known)}")

    def _check(self, name: str, ok: Any, wanted: str) -> None:
        if not ok:
            raise OptionError(name, f"{name}={getattr(self, name)!r}: must be {wanted}")

    @property
    def low_rank(self) -> bool:
        return self.groups != 1 or self.engine == "lowrank" or self.method.low_rank

    @property
    def conservative(self) -> bool:
        return self.method.rule.extra_forwards > 0

    @property
    def brings_its_engine(self) -> bool:
        """Whether method and enhancements are served by one engine alone."""
        return self.method.kind != "zeroth-order" or self.enhancements.sequential or self.method.sets > 1

    def problems(self) -> Iterator[OptionError]:
        """All that does not go together."""
        for option, when, text in TOGETHER:
            if when(self):
                yield OptionError(option(self) if callable(option) else option, text(self))

    def refuse(self) -> None:
        """Raise the first of `problems`."""
        for problem in self.problems():
            raise problem


RATES = ("lr", "eps", "weight_decay")  # of a parameter group


def check_rates(given: Mapping[str, Any]) -> None:
    """Raises OptionError for a rate that a parameter group cannot have; those that are not given are another's."""
    for name in (name for name in RATES if name in given):
        value, floor = given[name], "above 0" if name == "eps" else "at least 0"
        if name == "lr" and value == AUTO:
            continue
        if not _is_number(value):
            raise OptionError(name, f"{name}={value!r}: must be a number" + f" or {AUTO!r}" * (name == "lr"))
        if not (value > 0 if name == "eps" else value >= 0) or not value < math.inf:
            raise OptionError(name, f"{name}={value!r}: must be {floor} and finite")


def _is_number(value: Any) -> bool:
    tensor = hasattr(value, "item") and hasattr(value, "dim")  # of torch, which is not loaded here
    return (isinstance(value, Real) or tensor) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether this is a whole number from 1."""
    return _is_number(value) and 1 <= value < math.inf and value == int(value)


def _given(of: Choices) -> str:
    """The first enhancement that is given."""
    names = ("sparsity", "blocks", "hybrid", "g_clip")
    return next((name for name in names if getattr(of.enhancements, name) is not None), "")


def _needs_sequential(of: Choices) -> str:
    """What only an engine of its own serves, in words; "" where there is nothing."""
    if of.method.kind != "zeroth-order" or of.method.sets > 1:
        return f"method {of.name!r}"
    return _given(of) if of.enhancements.sequential else ""


def _plain(of: Choices) -> bool:
    """Whether an update is a list of coefficients and nothing else."""
    rule = of.method.rule
    coefficients = rule.linear and not getattr(rule, "memory", 0) and not of.conservative and not of.method.subspace
    return coefficients and not of.method.first_order and not of.enhancements.sequential


class Together(NamedTuple):
    """option: whose value the message is about. when: it does not go with the others. text: the message."""

    option: str | Callable[[Choices], str]
    when: Callable[[Choices], bool]
    text: Callable[[Choices], str]


LAYERLESS = ("prefix", "prompt", "head")  # schemes whose parameters belong to no layer

TOGETHER: tuple[Together, ...] = (
    Together(
        lambda of: of.enhancements.meaningless,
        lambda of: of.enhancements.meaningless != "",
        lambda of: (
            f"{(name := of.enhancements.meaningless)}={getattr(of.enhancements, name)!r}: means nothing without {MEANT_BY[name]}"
        ),
    ),
    Together(
        "hybrid",
        lambda of: of.enhancements.hybrid is not None and of.enhancements.fo_lr is None,
        lambda of: "hybrid: needs fo_lr, the learning rate of the layers that back-propagation trains",
    ),
    Together(
        "hybrid",
        lambda of: of.enhancements.hybrid is not None and of.enhancements.blocks is not None,
        lambda of: "hybrid and blocks: choose one; both say which layers a probe perturbs",
    ),
    Together(
        "lr",
        lambda of: of.lr == AUTO and (of.method.first_order or not of.method.rule.linear),
        lambda of: (
            f"lr='auto': is of updates that are lists of coefficients, whose noise they tell; those of method {of.name!r} are "
            "none; give a number"
        ),
    ),
    Together(
        _given,
        lambda of: of.method.first_order and _given(of) != "",
        lambda of: f"{_given(of)}: method {of.name!r} has no direction to apply it to; it is for zo-* and forward-grad",
    ),
    Together(
        lambda of: "blocks" if of.enhancements.blocks else "hybrid",
        lambda of: of.conservative and (of.enhancements.blocks is not None or of.enhancements.hybrid is not None),
        lambda of: (
            f"{'blocks' if of.enhancements.blocks else 'hybrid'}: method {of.name!r} compares one move of all "
            "weights; use zo-sgd"
        ),
    ),
    Together(
        lambda of: "hybrid" if of.enhancements.hybrid else "blocks",
        lambda of: (
            of.scheme in LAYERLESS
            and (of.enhancements.hybrid is not None or of.enhancements.blocks not in (None, "linear"))
        ),
        lambda of: (
            ("hybrid" if of.enhancements.hybrid else f"blocks={of.enhancements.blocks!r}")
            + f": scheme {of.scheme!r} trains nothing within the layers; use --scheme full or lora"
        ),
    ),
    Together(
        "mask",
        lambda of: of.enhancements.mask == "wanda" and of.scheme != "full",
        lambda of: (
            f"mask wanda scores the model's own linear maps, of which scheme {of.scheme!r} trains none; "
            "use --scheme full, or --mask random"
        ),
    ),
    Together(
        "fold_every",
        lambda of: (
            of.fold_every > 1 and (not _plain(of) or of.enhancements.hybrid is not None or bool(of.weight_decay))
        ),
        lambda of: (
            f"fold_every={of.fold_every}: only updates that are lists of coefficients can wait (zo-sgd, "
            "forward-grad, zo-sgd-sign with sign_mode scalar; no weight decay, masks, blocks or hybrid); use 1"
        ),
    ),
    Together(
        "weight_decay",
        lambda of: of.method.rule.rounding != "nearest" and bool(of.weight_decay) and of.low_rank,
        lambda of: (
            f"rounding='compensated' and weight_decay={of.weight_decay}: low-rank updates do not go with both; "
            "leave weight_decay at 0"
        ),
    ),
    Together(
        "weight_decay",
        lambda of: of.conservative and bool(of.weight_decay),
        lambda of: (
            f"weight_decay={of.weight_decay}: method {of.name!r} may stay at θ, which decay would move; leave it at 0"
        ),
    ),
    Together(
        lambda of: _given(of),
        lambda of: of.method.own_inputs and of.enhancements.sequential,
        lambda of: (
            f"{_given(of)}: method {of.name!r} gives each row directions of its own; leave it out, or use zo-sgd"
        ),
    ),
    Together(
        lambda of: _given(of),
        lambda of: of.method.low_rank and not of.method.own_inputs and of.enhancements.sequential,
        lambda of: f"{_given(of)}: the directions of method {of.name!r} are low-rank; leave it out, or use zo-sgd",
    ),
    Together(
        "sparsity",
        lambda of: of.method.sets > 1 and of.enhancements.sparsity is not None,
        lambda of: f"sparsity: each direction of method {of.name!r} has a mask of its own; leave it out, or use zo-sgd",
    ),
    Together(
        "engine",
        lambda of: of.method.low_rank and not of.method.own_inputs and of.engine not in ("auto", "lowrank"),
        lambda of: f"engine={of.engine!r}: method {of.name!r} is served by lowrank alone; use engine='auto'",
    ),
    Together(
        "groups",
        lambda of: (of.method.own_inputs or of.method.flipout) and of.groups != "batch",
        lambda of: f"groups={of.groups!r}: method {of.name!r} gives each row directions of its own; use groups='batch'",
    ),
    Together(
        "rank",
        lambda of: of.method.of_lowrank is not None and of.rank != 1,
        lambda of: f"rank={of.rank}: the directions of method {of.name!r} are of rank 1",
    ),
    Together(
        "fold_every",
        lambda of: of.method.flipout and of.fold_every > 1,
        lambda of: f"fold_every={of.fold_every}: the directions of a step of method {of.name!r} share a draw; use 1",
    ),
    Together(
        "fold_every",
        lambda of: of.method.needs_rows and of.fold_every > 1,
        lambda of: f"fold_every={of.fold_every}: an update of method {of.name!r} needs its step's rows; use 1",
    ),
    Together(
        "fold_every",
        lambda of: getattr(of.method.rule, "anchor", False) and of.fold_every > 1,
        lambda of: f"fold_every={of.fold_every}: an anchored decay is of each step; use 1, or leave the anchor out",
    ),
    Together(
        "rounding",
        lambda of: of.method.low_rank and not of.method.tracked_inputs and of.rounding != "nearest",
        lambda of: f"rounding={of.rounding!r}: not of method {of.name!r}; use 'nearest'",
    ),
    Together(
        "scheme",
        lambda of: of.method.of_inputs and of.scheme in ("prefix", "prompt"),
        lambda of: (
            f"scheme={of.scheme!r}: trains no linear map, whose inputs method {of.name!r} needs; use full, lora or head"
        ),
    ),
    Together(
        "engine",
        lambda of: (
            _needs_sequential(of) != ""
            and of.engine not in ("auto", "sequential", *(["forward-mode"] if of.method.forward_mode else []))
        ),
        lambda of: f"engine={of.engine!r}: does not serve {_needs_sequential(of)}; use engine='auto'",
    ),
    Together(
        "micro_batch",
        lambda of: (
            of.micro_batch is not None and (of.method.kind != "zeroth-order" or of.enhancements.hybrid is not None)
        ),
        lambda of: (
            f"micro_batch={of.micro_batch}: cuts a batch into rows with places of their own; "
            + ("hybrid" if of.enhancements.hybrid is not None else f"method {of.name!r}")
            + " differentiates the whole of it; use accumulate, or leave it out"
        ),
    ),
    Together(
        "groups",
        lambda of: _needs_sequential(of) != "" and of.groups != 1,
        lambda of: f"groups={of.groups!r}: does not go with {_needs_sequential(of)}; use groups=1",
    ),
    Together(
        "groups",
        lambda of: of.groups != 1 and of.engine in ("sequential", "dual"),
        lambda of: (
            f"groups={of.groups!r}: engine {of.engine!r} gives a batch one direction; use engine='lowrank' or 'auto'"
        ),
    ),
    Together(
        "rank",
        lambda of: of.rank != 1 and not of.low_rank,
        lambda of: f"rank={of.rank}: of low-rank directions; use engine='lowrank' or groups='batch' with it",
    ),
    Together(
        "method",
        lambda of: of.low_rank and not of.method.subspace and (of.conservative or not of.method.rule.linear),
        lambda of: (
            f"method {of.name!r} reads the estimate element by element or compares moves, which low-rank directions "
            "do not serve; use groups=1 and engine='auto', or zo-sgd"
        ),
    ),
)
