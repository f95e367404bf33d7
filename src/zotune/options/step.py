"""A step's options, once: flags, YAML, the Trainer's arguments, an optimizer's keywords, a trajectory's header and probes are
made of this model. Loads no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from zotune.errors import nearest
from zotune.files.checked import Options, Positive
from zotune.step.choices import AUTO

if TYPE_CHECKING:
    from zotune.methods import Method
    from zotune.step.choices import Choices

# Of the method; others are of what a step perturbs (`Enhancements`), or of every step.
METHOD_OPTIONS = ("estimator", "sign_mode", "momentum", "beta1", "beta2", "adam_eps", "state_dtype", "anchor")
OWN_PLACE = (
    "method",
    "lr",
    "direction",
    "engine",
    "weight_decay",
)  # of a trajectory's header, or of each of its records
ALWAYS = ("eps", "queries", "groups", "rank")  # in a trajectory's header, whatever they are


class StepOptions(Options):
    method: str = Field(
        "zo-sgd",
        description="see `zotune list methods`; a run without any option of a step takes what is best on its device",
    )
    direction: Literal["gaussian", "rademacher"] | None = Field(
        None, description="distribution of the directions [default: the method's own, else gaussian]"
    )
    estimator: Literal["two-sided", "one-sided", "leave-one-out"] | None = Field(
        None, description="how the losses give a gradient [default: the method's own, mostly two-sided]"
    )
    lr: float | Literal["auto"] | None = Field(
        None,
        description="learning rate, or auto: found in the run, by how far its noise carries the weights [default: by scheme and "
        "model size]",
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="perturbation of the weights [default: by scheme]"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    queries: Positive | None = Field(
        None, description="directions for the same rows [default: the method's own, mostly 1]"
    )
    groups: Positive | Literal["batch"] = Field(
        None,  # as it is seen never: see _groups
        validate_default=True,
        description="directions over the rows of a batch: 1, a number, or batch for one a row (engine lowrank) [default: the "
        "method's own, mostly 1]",
    )
    rank: Positive = Field(
        None,  # as it is seen never: see _rank
        validate_default=True,
        description="rank of the directions of engine lowrank, or of a method's subspace [default: the method's own, mostly 1]",
    )
    forward_tokens: Positive | None = Field(
        None,
        description="tokens of one forward at most, where places of a step share it [default: by memory on CUDA, 1024 on a CPU]",
    )
    micro_batch: Positive | None = Field(
        None, description="rows of a step that are evaluated together, what workers share out [default: all of a batch]"
    )
    fold_every: Positive = Field(
        1, description="apply the updates of so many steps together, in one pass over the weights"
    )
    rounding: Literal["nearest", "compensated"] = Field(
        "nearest",
        description="of updates of 16-bit weights; compensated keeps what rounding took, in as much memory as what trains",
    )
    sign_mode: Literal["element", "scalar"] | None = Field(
        None, description="of zo-sgd-sign: sign of each element of the estimate, or of g alone [default: element]"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="of zo-sgd-mmt [default: 0.9]")
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="of zo-adam and fo-adam: what the mean of the gradient keeps a step [default: 0.9]"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="of zo-adam and fo-adam: what the mean of its square keeps [default: 0.999]"
    )
    adam_eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of zo-adam and fo-adam: added to the root of that mean [default: 1e-8]"
    )
    state_dtype: Literal["float32", "bfloat16", "parameter"] | None = Field(
        None, description="of the state of momentum and Adam; parameter: that of each weight [default: float32]"
    )
    anchor: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="of es and eggroll: part of the way back to the base that each step takes; keeps what trains twice in memory "
        "[default: 0, none]",
    )
    g_clip: Annotated[float, Field(gt=0)] | None = Field(None, description="bound on |g| of each direction")
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="fraction of the weights that a step leaves out"
    )
    mask: Literal["random", "magnitude", "wanda"] | None = Field(
        None,
        description="which weights sparsity leaves out: random ones, the smallest, or those of least weight times input "
        "[default: random]",
    )
    sparsity_scope: Literal["layer", "global"] | None = Field(
        None, description="fraction of each tensor, or of all weights together [default: layer]"
    )
    mask_refresh: Positive | None = Field(None, description="steps until a new mask [default: never]")
    blocks: Literal["transformer", "attention-mlp", "linear"] | None = Field(
        None, description="descend block by block, all of them each step; each costs two forwards"
    )
    block_update: Literal["gauss-seidel", "jacobi"] | None = Field(
        None, description="move each block before the next is probed, or all at the end [default: gauss-seidel]"
    )
    hybrid: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="fraction of the layers, from the input on, that train by the method; the others by back-propagation",
    )
    fo_lr: Annotated[float, Field(ge=0)] | None = Field(None, description="learning rate of the others, with hybrid")
    engine: str = Field("auto", description="see `zotune list engines`")

    @field_validator("lr", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value is None or value == AUTO:
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (0 <= number < math.inf):
            raise ValueError(f"{value!r}: give a number from 0, or auto")
        return number

    @field_validator("groups", mode="before")
    @classmethod
    def _groups(cls, value: Any, info: Any) -> Any:
        if value is None:
            return own_of(info.data.get("method"), "groups")
        if value == "batch" or (str(value).isdecimal() and int(value) >= 1):
            return value if value == "batch" else int(value)
        raise ValueError(f"{value!r}: give 1, a number of directions, or batch")

    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any, info: Any) -> Any:
        return own_of(info.data.get("method"), "rank") if value is None else value

    @field_validator("method", "engine")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        return known_name(info.field_name, value)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The keywords of `ZeroOrderOptimizer` but for lr and seed: what is given, or has a default of its own."""
        names = (name for name in StepOptions.model_fields if name not in ("method", "lr"))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def made_method(self) -> Method:
        """The method with its options. Raises OptionError for those that it has not."""
        from zotune.methods import make_method

        own = {name: value for name in METHOD_OPTIONS if (value := getattr(self, name)) is not None}
        return make_method(self.method, queries=self.queries, **own)

    def choices(self, seed: int, scheme: str) -> Choices:
        """The options of a step, checked one by one; `Choices.problems` says what does not go together. Raises OptionError."""
        from zotune.step.choices import Choices
        from zotune.step.enhancements import Enhancements

        given = self.optimizer_options
        more = Enhancements(**{name: given.pop(name) for name in Enhancements.names() if name in given})
        own = {name: value for name, value in given.items() if name not in (*METHOD_OPTIONS, "queries")}
        own |= {} if self.lr is None else {"lr": self.lr}
        return Choices(self.made_method, self.method, seed, scheme=scheme, enhancements=more, **own)

    @property
    def recorded_options(self) -> dict[str, Any]:
        """What a trajectory's header keeps of them as `method_options`, with which an optimizer is made again."""
        from zotune.methods import find

        defaults = {name: field.default for name, field in StepOptions.model_fields.items()}
        given = {k: v for k, v in self.optimizer_options.items() if k not in OWN_PLACE}
        kept = {k: v for k, v in given.items() if k in ALWAYS or v != defaults[k]}
        found = find(self.method)
        kept["queries"] = self.directions_a_row if "queries" in found.options else self.queries or 1
        return kept | ({"estimator": self.estimator or found.estimator} if found.estimator else {})

    @property
    def directions_a_row(self) -> int:
        """Directions for the same rows: as given, else the method's own."""
        return max(1, self.made_method.queries)


def known_name(option: str, value: str) -> str:
    """The value, where it is a name that the option takes; `module:NAME` of a method says itself what is wrong with it."""
    from zotune.registry import names

    if option == "method":
        from zotune.methods import find

        find(value)
        return value
    known = names(option)
    if value not in known:
        raise ValueError(f"unknown {option} {value!r}; {nearest(value, known)}")
    return value


def own_of(method: str | None, option: str) -> Any:
    """groups or rank where nothing is said: the method's own, else 1."""
    from zotune.methods import make_method

    try:
        return getattr(make_method(method or "zo-sgd"), option) or 1
    except ValueError:  # is told of the method
        return 1
