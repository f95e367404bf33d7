"""The named methods: presets over an estimator and an update rule. None has a loop of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zotune.errors import nearest
from zotune.estimators import Directional, Estimator, Exact, OneSided, TwoSided
from zotune.updates import STATE_DTYPES, Adam, Conservative, Momentum, Rule, ScalarSign, Sgd, Sign


@dataclass(frozen=True)
class Method:
    estimator: Estimator
    rule: Rule

    @property
    def first_order(self) -> bool:
        """By back-propagation: the closure's loss needs a gradient."""
        return isinstance(self.estimator, Exact)

    @property
    def forward_mode(self) -> bool:
        """By forward-mode differentiation: directional derivatives instead of differences."""
        return isinstance(self.estimator, Directional)

    @property
    def forwards(self) -> int:
        """Evaluations of the loss on one batch that a step costs."""
        known = any(probe.sign == 0 for probe in self.estimator.probes)  # L(θ), which a conservative step compares
        extra = self.rule.extra_forwards
        return len(self.estimator.probes) + extra - (1 if extra and known else 0)


@dataclass(frozen=True)
class Preset:
    """A method's name and reference, what it costs, and the function that builds it from its options."""

    name: str
    paper: str
    forwards: str
    build: Callable[..., Method]

    @property
    def rule(self) -> str:
        """The first line of the docstring: the update rule."""
        return (self.build.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> list[str]:
        return list(inspect.signature(self.build).parameters)

    @property
    def own(self) -> dict[str, Any]:
        """Options that not every method has, with their defaults."""
        given = inspect.signature(self.build).parameters
        return {k: p.default for k, p in given.items() if k not in ("queries", "estimator")}

    @property
    def state(self) -> str:
        """What it keeps between steps."""
        copies = self.build().rule.state_copies
        return f"{copies} × trainable" if copies else "none"


METHODS: dict[str, Preset] = {}


def preset(name: str, paper: str, forwards: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    def register(build: Callable[..., Method]) -> Callable[..., Method]:
        METHODS[name] = Preset(name, paper, forwards, build)
        return build

    return register


BENCHMARK = "arXiv 2402.11592"


@preset("zo-sgd", paper="arXiv 2305.17333", forwards="2q")
def zo_sgd(queries: int = 1, estimator: str = "two-sided") -> Method:
    """θ ← θ − lr·ĝ, ĝ = (1/Q) Σ_q g_q·z_q."""
    return Method(_estimator(estimator, queries), Sgd())


@preset("zo-sgd-mmt", paper=BENCHMARK, forwards="2q")
def zo_sgd_mmt(
    queries: int = 1, estimator: str = "two-sided", momentum: float = 0.9, state_dtype: str = "float32"
) -> Method:
    """m ← momentum·m + ĝ, θ ← θ − lr·m."""
    return Method(_estimator(estimator, queries), Momentum(_state(state_dtype), beta=_decay_rate("momentum", momentum)))


@preset("zo-sgd-sign", paper="arXiv 1810.03737", forwards="2q")
def zo_sgd_sign(queries: int = 1, estimator: str = "two-sided", sign_mode: str = "element") -> Method:
    """θ ← θ − lr·sign(ĝ), element by element; sign_mode scalar: sign(g)·z."""
    if sign_mode not in ("element", "scalar"):
        raise ValueError(f"unknown sign_mode {sign_mode!r}; {nearest(sign_mode, ['element', 'scalar'])}")
    return Method(_estimator(estimator, queries), Sign() if sign_mode == "element" else ScalarSign())


@preset("zo-sgd-cons", paper=BENCHMARK, forwards="2q + 3")
def zo_sgd_cons(queries: int = 1, estimator: str = "two-sided") -> Method:
    """θ ← the best of θ, θ − lr·ĝ, θ + lr·ĝ on the same batch; on a tie θ stays."""
    return Method(_estimator(estimator, queries), Conservative())


@preset("zo-adam", paper=BENCHMARK, forwards="2q")
def zo_adam(
    queries: int = 1,
    estimator: str = "two-sided",
    beta1: float = 0.9,
    beta2: float = 0.999,
    adam_eps: float = 1e-8,
    state_dtype: str = "float32",
) -> Method:
    """θ ← θ − lr·m̂/(√v̂ + adam_eps), Adam's two moments of ĝ with bias correction."""
    return Method(_estimator(estimator, queries), _adam(beta1, beta2, adam_eps, state_dtype))


@preset("forward-grad", paper="arXiv 2202.08587", forwards="q (JVPs)")
def forward_grad(queries: int = 1) -> Method:
    """θ ← θ − lr·ĝ, ĝ = (1/Q) Σ_q (∇L·z_q)·z_q, by forward-mode differentiation: exact, no eps."""
    return Method(Directional(queries), Sgd())


@preset("fo-sgd", paper="yardstick", forwards="1, and a backward")
def fo_sgd() -> Method:
    """θ ← θ − lr·∇L, by back-propagation."""
    return Method(Exact(), Sgd())


@preset("fo-adam", paper="arXiv 1412.6980, yardstick", forwards="1, and a backward")
def fo_adam(beta1: float = 0.9, beta2: float = 0.999, adam_eps: float = 1e-8, state_dtype: str = "float32") -> Method:
    """Adam on ∇L, by back-propagation."""
    return Method(Exact(), _adam(beta1, beta2, adam_eps, state_dtype))


def make_method(name: str, **options: Any) -> Method:
    """The named method. An unknown name or option raises ValueError that names the nearest one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    known = METHODS[name].options
    if options.get("queries") == 1 and "queries" not in known:
        del options["queries"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"method {name!r} has no option {option!r}; {nearest(option, known) if known else 'it has none'}"
            )
    return METHODS[name].build(**options)


def has_eps(name: str) -> bool:
    """Whether the named method perturbs weights by eps: its estimate is a difference of losses."""
    if name not in METHODS:
        return True
    method = METHODS[name].build()
    return not (method.first_order or method.forward_mode)


def _estimator(name: str, queries: int) -> Estimator:
    kinds: dict[str, type[TwoSided] | type[OneSided]] = {"two-sided": TwoSided, "one-sided": OneSided}
    if name not in kinds:
        raise ValueError(f"unknown estimator {name!r}; {nearest(name, kinds)}")
    return kinds[name](queries)


def _adam(beta1: float, beta2: float, adam_eps: float, state_dtype: str) -> Adam:
    if not adam_eps > 0:
        raise ValueError(f"adam_eps={adam_eps!r}: must be above 0")
    return Adam(
        _state(state_dtype), beta1=_decay_rate("beta1", beta1), beta2=_decay_rate("beta2", beta2), epsilon=adam_eps
    )


def _decay_rate(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be at least 0 and under 1")
    return value


def _state(dtype: str) -> str:
    if dtype not in STATE_DTYPES:
        raise ValueError(f"unknown state_dtype {dtype!r}; {nearest(dtype, STATE_DTYPES)}")
    return dtype
