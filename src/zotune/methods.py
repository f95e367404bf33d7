"""The named methods: presets over an estimator and an update rule. None has a loop of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zotune.errors import nearest
from zotune.estimators import Estimator, OneSided, TwoSided
from zotune.updates import Sgd


@dataclass(frozen=True)
class Method:
    estimator: Estimator
    rule: Sgd


@dataclass(frozen=True)
class Preset:
    """A method's name and reference, and the function that builds it from its options."""

    name: str
    paper: str
    build: Callable[..., Method]

    @property
    def rule(self) -> str:
        """The first line of the docstring: the update rule."""
        return (self.build.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> list[str]:
        return list(inspect.signature(self.build).parameters)


METHODS: dict[str, Preset] = {}


def preset(name: str, paper: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    def register(build: Callable[..., Method]) -> Callable[..., Method]:
        METHODS[name] = Preset(name, paper, build)
        return build

    return register


@preset("zo-sgd", paper="arXiv 2305.17333")
def zo_sgd(queries: int = 1, estimator: str = "two-sided") -> Method:
    """θ ← θ − lr·ĝ, ĝ = (1/Q) Σ_q g_q·z_q."""
    kinds: dict[str, type[TwoSided] | type[OneSided]] = {"two-sided": TwoSided, "one-sided": OneSided}
    if estimator not in kinds:
        raise ValueError(f"unknown estimator {estimator!r}; {nearest(estimator, kinds)}")
    return Method(kinds[estimator](queries), Sgd())


def make_method(name: str, **options: Any) -> Method:
    """The named method. An unknown name or option raises ValueError that names the nearest one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    known = METHODS[name].options
    for option in options:
        if option not in known:
            raise ValueError(f"method {name!r} has no option {option!r}; {nearest(option, known)}")
    return METHODS[name].build(**options)
