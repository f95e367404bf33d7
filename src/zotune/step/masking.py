"""The masks of an optimizer's steps: when one is drawn, and what it takes from data."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from zotune.directions import Directions
from zotune.directions.calibration import Norms, measure
from zotune.directions.masks import Mask
from zotune.engines.reads import same_draws
from zotune.step.enhancements import Enhancements
from zotune.step.probing import whole

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer


class StepMasks:
    """norms: of the inputs of linear maps, by the step at which a mask of Wanda was drawn: what a replay needs.
    calibrate: evaluates the model on some rows, and says how many forward passes that took; None: masks are of their step's batch.
    """

    def __init__(self, of: Enhancements, seed: int) -> None:
        assert of.sparsity is not None
        self.mask = Mask(of.sparsity, seed, of.mask or "random", of.sparsity_scope or "layer", of.mask_refresh)
        self.norms: MutableMapping[int, Norms] = {}
        self.calibrate: Callable[[], int] | None = None

    def at(
        self, step: int, seed: int, directions: Directions, state: Any, norms: Callable[[int], Norms] | None = None
    ) -> bool:
        """The mask of a step. norms: makes those that it needs; None: they are the recorded ones.

        Returns whether it lies elsewhere in memory than the one before, so that graphs must not look for it there.
        """
        named = {directions.slots[id(p)].name: p for p in directions.params}
        version, self.mask.seed = self.mask.version, seed
        self.mask.at(step, named, state, norms or self._recorded)
        return self.mask.version != version

    def measured(self, drawn: int, directions: Directions, loss: Callable[[Any], Any], batches: Sequence[Any]) -> int:
        """Measure the norms at θ for the mask that is drawn at a step. Returns the forward passes that it took."""

        def own() -> int:
            whole(loss, batches)
            return len(batches)

        passes = list[int]()
        redraw = same_draws(directions.params)
        named = {directions.slots[id(p)].name: p for p in directions.params}
        self.norms[drawn] = measure(lambda: passes.append((self.calibrate or own)()), named)
        redraw()
        return passes[0]

    def _recorded(self, drawn: int) -> Norms:
        found = self.norms.get(drawn)
        if found is None:
            raise ValueError(
                f"mask='wanda': a replay needs the input norms of the run's step {drawn}; give optimizer.norms those of the run"
            )
        return found


def masked(of: ZeroOrderOptimizer, masks: StepMasks, loss: Any, batches: Sequence[Any]) -> int:
    """The mask of the step that comes next; without a loss one that was drawn from data is made of what is recorded.

    Returns the forward passes that it took.
    """
    directions, took = of.engine.directions, 0
    masks.calibrate, masks.norms = of.calibrate, of.norms

    def measured(drawn: int) -> Norms:
        nonlocal took
        took += masks.measured(drawn, directions, loss, batches)
        return of.norms[drawn]

    seed = of.param_groups[0]["seed"]
    if masks.at(of.steps, seed, directions, of.state, None if loss is None else measured):
        of.captured.forget()  # graphs read the mask where it was
    return took
