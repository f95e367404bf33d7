"""What a method is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from zotune.estimators import Estimator, TwoSided
from zotune.updates import Rule, Sgd


@dataclass(frozen=True)
class Method:
    """Where a step looks, and what it does with what it saw.

    estimator: losses at places → differences (`zotune.estimators.Estimator`); None: no losses are compared.
    rule: projected gradients → the update (`zotune.updates.Rule`).
    derivatives: without an estimator, how many directional derivatives a step takes by forward-mode differentiation; 0: the
        gradient by back-propagation.
    own_inputs: directions u·vᵀ of each linear map, v made of what the row itself gives the map (`zotune.engines.own_inputs`).
    maximize: what is evaluated at places is a reward: its negative is the loss, here and wherever losses are told of.
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
    direction: str | None = None
    lr: float | None = None
    eps: float | None = None
    groups: int | str | None = None

    def __post_init__(self) -> None:
        if self.estimator is not None and self.derivatives:
            raise ValueError(f"derivatives={self.derivatives}: beside an estimator there are none; give estimator=None")
        if self.own_inputs and self.estimator is None:
            raise ValueError("own_inputs=True: of directions that losses are compared along; give an estimator")

    @property
    def kind(self) -> str:
        """ "zeroth-order", "forward-mode" or "first-order": what a step asks of the model."""
        if self.estimator is not None:
            return "zeroth-order"
        return "forward-mode" if self.derivatives else "first-order"

    def own(self, name: str, given: float | None, default: float) -> float:
        """lr or eps: as given, else the method's own, else the default."""
        mine: float | None = getattr(self, name)
        return given if given is not None else default if mine is None else mine

    @property
    def needs_rows(self) -> bool:
        """Whether an update is a function of the step's rows too, so that its seeds and scalars alone cannot give it again."""
        return self.own_inputs

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
    def forwards(self) -> int:
        """Evaluations of the loss on one batch that a step costs, however many of them share a forward."""
        known = 0 in self.signs  # L(θ), which a conservative step compares
        extra = self.rule.extra_forwards
        inputs = int(self.own_inputs)  # a forward at θ tells them
        return len(self.signs) + inputs + extra - (1 if extra and known else 0)
