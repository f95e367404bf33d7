"""What there is to choose from, for help, checks and `zotune list`. Loads torch only for schemes."""

from __future__ import annotations

from typing import Any


def names(kind: str) -> list[str]:
    """The names that an option takes: kind is "method", "scheme", "engine" or "task"."""
    return [name for name, _ in entries(kind)] + (["auto"] if kind == "engine" else [])


def entries(kind: str) -> list[tuple[str, str]]:
    """(name, what it is) of each."""
    if kind == "method":
        from zotune.methods import METHODS, plugins

        return [
            (
                name,
                f"{preset.rule}  forwards a step: {preset.forwards}; state: {preset.state}"
                + "".join(f"; --{k.replace('_', '-')} {default}" for k, default in preset.own.items())
                + f"  [{preset.paper}]",
            )
            for name, preset in METHODS.items()
        ] + [(name, f"{point.value}, brought by {_package(point)}") for name, point in plugins().items()]
    if kind == "scheme":
        from zotune.models.schemes import SCHEMES

        return [(name, scheme.trains) for name, scheme in SCHEMES.items()]
    if kind == "engine":
        from zotune.engines import ENGINES

        return list(ENGINES.items())
    assert kind == "task"
    from zotune.tasks import TASKS

    return [(name, f"{task.asked} → {_answers(task)}  [{task.metric}]") for name, task in TASKS.items()]


def _package(point: Any) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an installed package"


def _answers(task: Any) -> str:
    if task.words:
        return " / ".join(task.words.values())
    return "a text" if task.generates else "one of the row's choices"
