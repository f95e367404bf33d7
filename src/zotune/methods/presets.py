"""The named methods: presets over an estimator and an update rule. A new one is a function here, and a row in the tests' table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zotune.errors import OptionError, nearest
from zotune.estimators import ESTIMATORS, Estimator, LeaveOneOut, OneSided, TwoSided
from zotune.methods.method import Method
from zotune.updates import (
    STATE_DTYPES,
    Adam,
    Average,
    Conservative,
    MeanSquare,
    Momentum,
    Normalised,
    Orthogonalised,
    RowNormalised,
    ScalarSign,
    Sgd,
    Sign,
    Standardised,
)


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
    def queries(self) -> int:
        """Directions a step, where nothing is said."""
        given = inspect.signature(self.build).parameters
        return int(given["queries"].default) if "queries" in given else 1

    @property
    def own(self) -> dict[str, Any]:
        """Options that not every method has, with their defaults."""
        given = inspect.signature(self.build).parameters
        return {k: p.default for k, p in given.items() if k not in ("queries", "estimator", "maximize")}

    @property
    def estimator(self) -> str | None:
        """How the losses give a gradient, where nothing is said and there is a choice."""
        given = inspect.signature(self.build).parameters
        return str(given["estimator"].default) if "estimator" in given else None

    @property
    def state(self) -> str:
        """What it keeps between steps."""
        method = self.build()
        if getattr(method.rule, "memory", 0):
            return "a number"
        if method.tracked_inputs:
            return "a basis of each map"
        copies = method.rule.state_copies
        if method.subspace is not None:
            return f"{copies} × core, and the subspace" if copies else "the subspace"
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
    return Method(_estimator(estimator, queries), Momentum(_state(state_dtype), beta=_share("momentum", momentum)))


@preset("zo-sgd-sign", paper="arXiv 1810.03737", forwards="2q")
def zo_sgd_sign(queries: int = 1, estimator: str = "two-sided", sign_mode: str = "element") -> Method:
    """θ ← θ − lr·sign(ĝ), element by element; sign_mode scalar: sign(g)·z."""
    if sign_mode not in ("element", "scalar"):
        raise OptionError("sign_mode", f"unknown sign_mode {sign_mode!r}; {nearest(sign_mode, ['element', 'scalar'])}")
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
    return Method(None, Sgd(), derivatives=queries)


@preset("fo-sgd", paper="yardstick", forwards="1, and a backward")
def fo_sgd() -> Method:
    """θ ← θ − lr·∇L, by back-propagation."""
    return Method(None, Sgd())


@preset("fo-adam", paper="arXiv 1412.6980, yardstick", forwards="1, and a backward")
def fo_adam(beta1: float = 0.9, beta2: float = 0.999, adam_eps: float = 1e-8, state_dtype: str = "float32") -> Method:
    """Adam on ∇L, by back-propagation."""
    return Method(None, _adam(beta1, beta2, adam_eps, state_dtype))


@preset("leave-one-out", paper="AIM-ZO's baseline", forwards="q")
def leave_one_out(queries: int = 16) -> Method:
    """θ ← θ − lr·ĝ, each loss beside the mean of the others: g_q = Q/(Q − 1)·(L_q − mean L)/eps."""
    return Method(LeaveOneOut(queries), Sgd())


@preset("fzoo", paper="arXiv 2506.09034", forwards="q + 1")
def fzoo(queries: int = 8) -> Method:
    """θ ← θ − lr·(1/Q) Σ_q (L_q − L_0)/std(L)·z_q, z of signs: in units of the losses' own spread."""
    return Method(OneSided(queries), Normalised(), direction="rademacher", lr=5e-5, eps=1e-4)


@preset("meazo", paper="arXiv 2605.03869", forwards="2q")
def meazo(queries: int = 1, estimator: str = "two-sided") -> Method:
    """θ ← θ − lr/(√v̂ + 1e-8)·ĝ, v ← 0.999·v + 0.001·ḡ²: Adam's second moment as one number, ḡ the mean of the g_q."""
    return Method(_estimator(estimator, queries), MeanSquare(), lr=1e-4)


@preset("grzo", paper="arXiv 2606.02857", forwards="2")
def grzo() -> Method:
    """θ ← θ − lr·Σ_i a_i·z_i/(2·eps·B), a_i = d_i/(std(d) + 1e-8) of row i's d_i, z_i = U∘(r_i·s_iᵀ): signs about one U a step."""
    return Method(TwoSided(), RowNormalised(), flipout=True, groups="batch", lr=1e-6, eps=1e-3)


@preset("copes", paper="arXiv 2608.02391", forwards="q")
def copes(queries: int = 32) -> Method:
    """θ ← θ − lr·Σ_k mean over q of set k of ẑ_q·ε_q, ẑ the z-score of L_q among all; q reaches one of 4 random sets at 2·eps."""
    return Method(LeaveOneOut(queries), Normalised(scale=2.0), sets=4, lr=5e-4, eps=1e-3)


@preset("lozo-m", paper="arXiv 2410.07698", forwards="2q")
def lozo_m(queries: int = 1, estimator: str = "two-sided") -> Method:
    """W ← W − lr·N·Vᵀ/2, N ← 0.9·N + 0.1·ĝ of z = U·Vᵀ, rank 2: U anew each step, V each 50, when N ← N·(VᵀV′)/D."""
    from zotune.directions.subspaces import Subspace

    normal = Subspace(right="normal", every=50, step=None)
    return Method(_estimator(estimator, queries), Average(beta=0.9), subspace=normal, rank=2, lr=1e-6, eps=1e-3)


@preset("zo-muon", paper="arXiv 2602.17155", forwards="q + 1")
def zo_muon(queries: int = 4) -> Method:
    """W ← W − lr·P·msign(M), M = (1/Q) Σ_q g_q·u_q of z = P·u, rank 64: P orthonormal, anew each 100 steps; vectors at 1e-5·lr."""
    from zotune.directions.subspaces import Subspace

    subspace = Subspace(left="orthonormal", every=100)
    return Method(OneSided(queries), Orthogonalised(), subspace=subspace, rank=64, lr=1e-2, eps=1e-3)


@preset("subzero-plus", paper="arXiv 2608.15665", forwards="q + 1")
def subzero_plus(queries: int = 99) -> Method:
    """W ← W + P·Δ·Qᵀ, Δ Adam's step on the r × r core of z = P·u·Qᵀ, rank 16: P and Q orthonormal, one pair for the run."""
    from zotune.directions.subspaces import Subspace

    both = Subspace(left="orthonormal", right="orthonormal")
    return Method(OneSided(queries), Adam(), subspace=both, rank=16, lr=2e-2, eps=1e-3)


@preset("zo-act", paper="arXiv 2607.01125", forwards="2q, and 1 a run")
def zo_act(queries: int = 1, estimator: str = "two-sided") -> Method:
    """W ← W + Δ·Vᵀ, Δ Adam's step on C (O × r) of z = u·Vᵀ, rank 1: V the main directions of the first batch's inputs of a map."""
    from zotune.directions.subspaces import Subspace

    inputs = Subspace(inputs=True)
    return Method(_estimator(estimator, queries), Adam(), subspace=inputs, rank=1, lr=1e-3, eps=1e-3)


@preset("aim-zo", paper="AIM-ZO", forwards="q + 1")
def aim_zo(queries: int = 15) -> Method:
    """W ← W − lr·(1/Q) Σ_q g_q·a_q·(Q·b_q)ᵀ, leave-one-out: Q follows a map's inputs, 64 of its 128 columns active."""
    return Method(LeaveOneOut(queries), Sgd(), tracked_inputs=True, lr=1e-3, eps=8e-5)


@preset("own-inputs", paper="measured here", forwards="2q + 1")
def own_inputs(queries: int = 16, estimator: str = "two-sided") -> Method:
    """W ← W − lr·(1/B)(1/Q) Σ_iq g_iq·u_iq·v_iᵀ, row i under ΔW = ε·u·vᵀ: v its own input of the map, x/‖x‖ at its last token."""
    return Method(_estimator(estimator, queries), Sgd(), own_inputs=True, groups="batch", lr=2e-3, eps=1e-2)


@preset("es", paper="arXiv 2509.24372", forwards="q, or 2q two-sided")
def es(queries: int = 30, estimator: str = "leave-one-out", anchor: float = 0.0, maximize: bool = False) -> Method:
    """θ ← θ − lr·(1/Q) Σ_q ẑ(L_q)·z_q, ẑ the z-score over the members of the same rows; two-sided: over antithetic pairs."""
    rule = (Standardised if estimator == "two-sided" else Normalised)(anchor=_share("anchor", anchor))
    return Method(_estimator(estimator, queries), rule, maximize=maximize, lr=5e-4, eps=1e-3)


@preset("eggroll", paper="arXiv 2511.16652", forwards="q, or 2q two-sided")
def eggroll(queries: int = 30, estimator: str = "leave-one-out", anchor: float = 0.0, maximize: bool = False) -> Method:
    """θ ← θ − lr·ĝ, each loss beside the mean of the same rows' others; of low-rank directions, with engine lowrank."""
    return Method(_estimator(estimator, queries), Sgd(anchor=_share("anchor", anchor)), maximize=maximize)


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise OptionError(name, f"{name}={value!r}: must be at least 0 and under 1")
    return value


def _estimator(name: str, queries: int) -> Estimator:
    if name not in ESTIMATORS:
        raise OptionError("estimator", f"unknown estimator {name!r}; {nearest(name, ESTIMATORS)}")
    return ESTIMATORS[name](queries)


def _adam(beta1: float, beta2: float, adam_eps: float, state_dtype: str) -> Adam:
    if not adam_eps > 0:
        raise OptionError("adam_eps", f"adam_eps={adam_eps!r}: must be above 0")
    return Adam(_state(state_dtype), beta1=_share("beta1", beta1), beta2=_share("beta2", beta2), epsilon=adam_eps)


def _state(dtype: str) -> str:
    if dtype not in STATE_DTYPES:
        raise OptionError("state_dtype", f"unknown state_dtype {dtype!r}; {nearest(dtype, STATE_DTYPES)}")
    return dtype
