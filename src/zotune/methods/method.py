"""What a method is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zotune.errors import OptionError
from zotune.estimators import Estimator, TwoSided
from zotune.updates import Rule, Sgd

if TYPE_CHECKING:
    from zotune.directions.subspaces import Subspace  # whose room loads torch

MOST_SETS = 256  # a direction's set is a byte of its seed: `zotune.directions.partition`


@dataclass(frozen=True)
class Method:
    """Where a step looks, and what it does with what it saw.

    estimator: losses at places → differences (`zotune.estimators.Estimator`); None: no losses are compared.
    rule: projected gradients → the update (`zotune.updates.Rule`).
    derivatives: without an estimator, how many directional derivatives a step takes by forward-mode differentiation; 0: the
        gradient by back-propagation.
    own_inputs: directions u·vᵀ of each linear map, v made of what the row itself gives the map (`zotune.engines.own_inputs`).
    maximize: what is evaluated at places is a reward: its negative is the loss, here and wherever losses are told of.
    tracked_inputs: directions a·(Q·b)ᵀ of each linear map, Q a basis that follows its inputs (`zotune.engines.tracked`).
    flipout: a direction U∘(r·sᵀ) for each row, U of the step and the signs r and s of the row (`zotune.engines.flipout`).
    subspace: directions P·u·Qᵀ of matrices, P and Q kept for many steps; the rule moves u's core (`zotune.engines.subspace`).
    sets: random sets that the elements are dealt out to; direction q reaches one, number q modulo sets, √sets times as far.
    rank: of u, or of the low-rank directions of engine lowrank.
    direction, lr, eps, groups: what the method was found to need, where a run does not say; None: the run's own defaults.

    >>> from zotune.estimators import OneSided
    >>> from zotune.updates import Momentum
    >>> Method(OneSided(4), Momentum(beta=0.5)).forwards
    5
    """

    estimator: Estimator | None = field(default_factory=TwoSided)
    rule: Rule = field(default_factory=Sgd)
    derivatives: int = 0
    own_inputs: bool = False
    maximize: bool = False
    tracked_inputs: bool = False
    flipout: bool = False
    subspace: Subspace | None = None
    sets: int = 1
    rank: int | None = None
    direction: str | None = None
    lr: float | None = None
    eps: float | None = None
    groups: int | str | None = None

    def __post_init__(self) -> None:
        if self.estimator is not None and self.derivatives:
            raise ValueError(f"derivatives={self.derivatives}: beside an estimator there are none; give estimator=None")
        if self.own_inputs and self.estimator is None:
            raise ValueError("own_inputs=True: of directions that losses are compared along; give an estimator")
        if self.subspace is not None and (self.estimator is None or self.own_inputs or self.rule.extra_forwards):
            raise ValueError(
                "subspace: of directions that losses are compared along; give an estimator and a rule with `move`"
            )
        if self.sets > 1 and (self.estimator is None or not self.rule.linear or self.own_inputs or self.subspace):
            raise ValueError(
                f"sets={self.sets}: of dense directions; give an estimator and a rule that is a list of coefficients"
            )
        if not 1 <= self.sets <= MOST_SETS or self.queries % self.sets * (self.sets > 1):
            raise OptionError(
                "queries",
                f"queries={self.queries}: as many for each of {self.sets} sets; give a multiple of {self.sets}",
            )

    @property
    def kind(self) -> str:
        """ "zeroth-order", "forward-mode" or "first-order": what a step asks of the model."""
        if self.estimator is not None:
            return "zeroth-order"
        return "forward-mode" if self.derivatives else "first-order"

    def own(self, name: str, given: Any, default: float) -> Any:
        """lr or eps: as given (lr "auto" too), else the method's own, else the default."""
        mine = getattr(self, name)
        return given if given is not None else default if mine is None else mine

    @property
    def needs_rows(self) -> bool:
        """Whether an update is a function of the step's rows too, so that its seeds and scalars alone cannot give it again."""
        return self.of_inputs

    @property
    def of_inputs(self) -> bool:
        """Whether directions are made of what linear maps are given."""
        return self.own_inputs or self.tracked_inputs or (self.subspace is not None and self.subspace.inputs)

    @property
    def low_rank(self) -> bool:
        """Whether directions are of a kind that engine lowrank alone evaluates."""
        return self.of_lowrank is not None or self.subspace is not None

    @property
    def of_lowrank(self) -> Literal["own-inputs", "tracked-inputs", "flipout"] | None:
        """What engine lowrank makes directions of, where that is neither seeds alone nor a subspace."""
        if self.own_inputs:
            return "own-inputs"
        return "tracked-inputs" if self.tracked_inputs else "flipout" if self.flipout else None

    @property
    def first_order(self) -> bool:
        """By back-propagation: the closure's loss needs a gradient."""
        return self.kind == "first-order"

    @property
    def forward_mode(self) -> bool:
        """By forward-mode differentiation: directional derivatives instead of differences."""
        return self.kind == "forward-mode"

    @property
    def queries(self) -> int:
        """Directions for the same rows."""
        return self.derivatives if self.estimator is None else self.estimator.queries

    @property
    def signs(self) -> tuple[int, ...]:
        """Of each evaluation of a batch in the estimate, in order; 0 is θ itself."""
        if self.estimator is None:
            return (0,) * max(1, self.derivatives)
        return tuple(probe.sign for probe in self.estimator.probes)

    @property
    def forwards_once(self) -> int:
        """Evaluations of the loss beside those, at a run's first step."""
        return int(self.subspace is not None and self.subspace.inputs)

    @property
    def forwards(self) -> int:
        """Evaluations of the loss on one batch that a step costs, however many of them share a forward."""
        known = 0 in self.signs  # L(θ), which a conservative step compares
        extra = self.rule.extra_forwards
        inputs = int(self.own_inputs or self.tracked_inputs)  # a forward at θ tells them
        return len(self.signs) + inputs + extra - (1 if extra and known else 0)
