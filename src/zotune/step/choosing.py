"""Which engines serve a step: one over all that the method trains, and one a block where it descends block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zotune.directions import Directions
from zotune.directions.masks import Mask, MaskedDirections
from zotune.directions.partition import PartitionedDirections
from zotune.engines import choose, make_engine
from zotune.engines.following import FollowingEngine
from zotune.engines.forward_mode import ForwardModeEngine
from zotune.engines.sequential import SequentialEngine
from zotune.errors import OptionError
from zotune.step.blocks import partition
from zotune.step.choices import Choices
from zotune.step.shards import Shards

Named = list[list[tuple[str, Any]]]  # (name, parameter), by parameter group


def engines_over(
    groups: Sequence[dict[str, Any]], of: Choices, direction: str, mask: Mask | None, shards: Shards
) -> tuple[Any, list[Any]]:
    """The engine over the parameters that are perturbed, and those that a step visits in order: that one, or one a block."""
    named: Named = [[] if g.get("first_order") else list(zip(g["names"], g["params"], strict=True)) for g in groups]
    engine = _engine(named, of, direction, mask, shards)
    if not of.enhancements.blocks:
        return engine, [engine]
    parts = partition([name for group in named for name, _ in group], of.enhancements.blocks)
    blocks = [
        _engine([[pair for pair in group if pair[0] in set(names)] for group in named], of, direction, mask, shards)
        for names in parts.values()
    ]
    for block in blocks:
        block.scratch = engine.scratch
    return engine, blocks


def _engine(named: Named, of: Choices, direction: str, mask: Mask | None, shards: Shards) -> Any:
    if shards:
        return shards.engine(named, of, direction)
    directions = Directions(named, direction)
    if not of.brings_its_engine:
        kind = of.method.subspace or of.method.of_lowrank
        if spread(directions):
            if of.low_rank or of.engine not in ("auto", "sequential"):
                what = f"engine={of.engine!r}" if of.engine == "dual" else "low-rank directions"
                raise OptionError(
                    "engine",
                    f"{what}: not where a model's weights lie on several devices; use engine='sequential' with groups=1",
                )
            return SequentialEngine(directions)
        return make_engine(of.engine, directions, of.groups, int(of.rank), of.forward_tokens, kind)
    if of.method.sets > 1:
        directions = PartitionedDirections(named, direction, of.method.sets, int(of.seed))
    if mask is not None:
        directions = masked = MaskedDirections(named, direction)
        masked.mask = mask
    return (ForwardModeEngine if of.method.forward_mode else SequentialEngine)(directions)


def spread(directions: Directions) -> bool:
    """Whether the parameters are on several devices, as `device_map` puts them: engines that draw many at once want one."""
    return len({param.device for param in directions.params}) > 1


def reason(engine: Any, of: Choices) -> str:
    """The engine's name, and why it was taken where it was not named; or why it does not share forwards after all."""
    name = engine.name
    if of.method.first_order:
        return "back-propagation: the method's own"
    if isinstance(engine, FollowingEngine) and not engine.usable:
        return f"{name}: by separate forwards, since {engine.why}"
    if of.engine != "auto":
        return f"{name}: as asked for"
    if engine.directions.scattered or spread(engine.directions):
        return (
            f"{name}: the model's weights lie over several {'processes' if engine.directions.scattered else 'devices'}"
        )
    if of.brings_its_engine:
        return f"{name}: what the method and its enhancements are served by"
    return f"{name}: {choose(of.groups, of.method.low_rank)[1]}"
