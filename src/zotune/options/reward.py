"""The options of `zotune reward`: a run's, and what is asked, how it is answered, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from zotune.files.checked import Positive
from zotune.methods import queries_of
from zotune.options.commands import RunOptions
from zotune.options.step import METHOD_OPTIONS
from zotune.step.choices import AUTO

HELD_OUT = 64  # prompts that are scored, where nothing is said
BY_OTHER_NAMES = {
    "eps": "of rewards it is --sigma, how far a member is from the model",
    "queries": "of rewards it is --members, the perturbed models a prompt",
}


class RewardConfig(RunOptions):
    method: str = Field("es", description="es, eggroll or another zeroth-order method, see `zotune list methods`")
    engine: str = Field("lowrank", description="lowrank: low-rank directions; sequential: dense ones")
    eps: Annotated[float, Field(gt=0)] | None = Field(None, description="no option here: see --sigma")
    queries: Positive | None = Field(None, description="no option here: see --members")
    lr: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        None,
        description="step size, which keeps its proportion to sigma [default: auto, by which the noise of all steps carries the "
        "weights 0.03 of their root mean square]",
    )
    rounding: Literal["nearest", "compensated"] | None = Field(  # type: ignore[assignment]
        None,
        description="of updates; compensated keeps what rounding took, in as much memory as what trains [default: compensated "
        "where weights have 16 bits]",
    )
    data: str | None = Field(
        None,
        description="prompts: a column prompt of texts or messages, in a folder, a file or a hub data set as of `zotune train`, or "
        "gym:TASK of reasoning-gym",
    )
    steps: Positive = Field(200, description="updates")
    batch_size: Positive = Field(16, description="prompts a step")
    eval_size: Positive | None = Field(None, description=f"at most so many held-out prompts [default: {HELD_OUT}]")
    max_length: Positive | None = Field(None, description="cut longer prompts to so many tokens, at their start")
    log_every: Positive = Field(1, description="steps between lines of metrics.jsonl")
    chat: bool = Field(False, description="ask texts through the chat template, as a user's message")
    reward: list[str] = Field(
        [],
        json_schema_extra={"repeat": True},
        description="what answers are worth; may be given again: exact-match[:COLUMN], token-f1[:COLUMN], json[:SCHEMA.json], "
        "length:N, regex:PATTERN, model:NAME, gym:TASK, FILE.py:function or package.module:function",
    )
    reward_weights: list[float] | None = Field(
        None, description="JSON, of the functions, such as '[1, 0.2]' [default: 1]"
    )
    reward_timeout: Annotated[float, Field(gt=0)] = Field(
        300.0, description="seconds that a call of a reward function may take"
    )
    members: Annotated[int, Field(ge=2)] = Field(32, description="perturbed models a prompt")
    sigma: Annotated[float, Field(gt=0)] | None = Field(
        None, description="how far members are from the model [default: 0.02 of the root mean square of what trains]"
    )
    sigma_schedule: Literal["cosine", "constant"] = Field("cosine", description="cosine: to half of sigma over the run")
    max_new_tokens: Positive = Field(64, description="at most so many tokens of an answer")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0, description="0: the likeliest token; else drawn, all members by the same luck"
    )
    top_k: Positive | None = Field(None, description="draw from so many likeliest tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="draw from the fewest tokens that have this probability"
    )
    decoder: Literal["auto", "slots", "generate"] = Field("auto", description="what writes the answers")
    slots: Positive | None = Field(None, description="answers written at a time, at most [default: by device]")
    show_every: Positive | None = Field(
        None, description="steps between tables of some answers, kept in completions.jsonl [default: as eval-every]"
    )
    show: Positive = Field(4, description="answers in a table")

    _functions: list[Callable[..., Any]] = PrivateAttr(default_factory=list)

    @property
    def functions(self) -> list[Any]:
        """The reward functions: those in memory, else their names."""
        return [*self._functions] or [*self.reward]

    def set_functions(self, functions: list[Callable[..., Any]]) -> None:
        self._functions = functions

    @field_validator("reward", "reward_weights", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: Any) -> Any:
        """A list, as YAML and a repeated flag give it, its JSON, or of functions one name."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except ValueError as error:
                raise ValueError(f"not JSON ({error}); write '[1, 0.2]'") from None
        return [value] if info.field_name == "reward" else value.split(",")

    @property
    def shows_every(self) -> int:
        return self.show_every or self.evaluates_every

    @property
    def directions(self) -> int:
        """The directions for the same prompts that make the members. Raises OptionError where none do."""
        own = {name: value for name in METHOD_OPTIONS if (value := getattr(self, name)) is not None}
        return queries_of(self.members, self.method, **own)

    @property
    def filled(self) -> RewardConfig:
        """With what the step's options are called elsewhere: eps, queries, and lr where none is given."""
        lr = AUTO if self.lr is None else self.lr
        return self.model_copy(update={"eps": self.sigma, "queries": self.directions, "lr": lr})

    def problems(self) -> Iterator[str]:
        """What cannot be, or does not go together, but for the step's own options."""
        own = {"eps": self.sigma, "queries": self.directions}
        for name, why in BY_OTHER_NAMES.items():
            if getattr(self, name) not in (None, own[name]):  # a run's own config.yaml has them
                yield f"--{name} {getattr(self, name)}: {why}"
        if self.data is None:
            yield "--data: required, the prompts"
        if not self.reward:
            yield "--reward: required, what answers are worth, such as exact-match or FILE.py:function"
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            yield f"--reward-weights: {len(self.reward_weights)} of them for {len(self.reward)} reward functions"
        for name in ("sparsity", "blocks", "hybrid"):
            if getattr(self, name) is not None:
                yield f"--{name} {getattr(self, name)}: members are perturbed in all that trains; leave it out"
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                yield f"--{name.replace('_', '-')}: nothing is drawn at temperature 0; give --temperature 1"
