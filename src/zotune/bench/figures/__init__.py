"""Figures, a file each: a module with NAME, TITLE, ABOUT and `draw(runs, groups)`.

`draw` gives None where the store has not its data.
"""

from types import ModuleType

from zotune.bench.figures import (
    accuracy,
    alignment,
    context,
    curves,
    enhancements,
    memory,
    pareto_memory,
    pareto_time,
    passes,
    queries,
    seconds,
    sensitivity,
)


def modules() -> list[ModuleType]:
    """The figures in the order of the report."""
    return [
        accuracy, memory, context, passes, seconds, queries, curves, alignment, enhancements, pareto_memory, pareto_time,
        sensitivity,
    ]  # fmt: skip
