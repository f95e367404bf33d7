"""`RewardTrainingArguments`: what a `RewardTrainer` is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zotune.errors import InputError
from zotune.methods import queries_of
from zotune.step.choices import AUTO
from zotune.step.enhancements import Enhancements
from zotune.trainer.arguments import ZOTrainingArguments

SCHEDULES = ("cosine", "constant")


@dataclass
class RewardTrainingArguments(ZOTrainingArguments):
    """`ZOTrainingArguments` for rewards: a population of `members` perturbed models a step, each answering all of its prompts.

    `eps` and `queries` follow from `sigma` and `members`. Where no `sigma` is given it is 0.02·s, s the root mean square of what
    trains; where no rate is, it is `lr="auto"`: the noise of all steps carries the weights 0.03·s (`zotune.step.rates`). The rate
    keeps its proportion to `sigma` while this falls. Names that TRL has mean what they mean there.
    """

    method: Any = field(
        default="es", metadata={"help": "es (z-score over the members), eggroll, or another zeroth-order one"}
    )
    members: int = field(default=32, metadata={"help": "perturbed models a step"})
    sigma: float | None = field(
        default=None,
        metadata={
            "help": "how far they are from the model, in units of the weights [0.02 of the root mean square of what trains]"
        },
    )
    sigma_schedule: str = field(default="cosine", metadata={"help": "cosine (to half of it) or constant"})
    engine: str = field(
        default="lowrank", metadata={"help": "lowrank (low-rank directions), or sequential (dense ones)"}
    )
    rounding: Any = field(
        default=None, metadata={"help": "nearest or compensated [compensated where weights have 16 bits]"}
    )
    learning_rate: Any = field(default=None, metadata={"help": "step size [by lr auto]"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "prompts a step"})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "of the functions, in their order [1 each]"}
    )
    reward_timeout: float | None = field(
        default=300.0, metadata={"help": "seconds that a reward function may take; None: any"}
    )
    max_completion_length: int = field(default=64, metadata={"help": "tokens of an answer at most"})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest token"})
    top_k: int | None = field(default=None, metadata={"help": "draw from so many likeliest tokens"})
    top_p: float | None = field(
        default=None, metadata={"help": "draw from the fewest tokens that have this probability"}
    )
    chat: bool = field(default=False, metadata={"help": "ask texts through the chat template, as a user's message"})
    decoder: str = field(default="auto", metadata={"help": "slots or generate"})
    slots: int | None = field(default=None, metadata={"help": "answers written at a time, at most"})
    log_completions: bool = field(default=False, metadata={"help": "print some answers with their rewards at each log"})
    num_completions_to_print: int = field(default=4, metadata={"help": "how many of them"})
    remove_unused_columns: bool = False
    logging_steps: float = 10

    def __post_init__(self) -> None:
        if self.sigma is not None and not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise InputError(f"sigma={self.sigma!r}: must be above 0")
        if self.sigma_schedule not in SCHEDULES:
            raise InputError(f"sigma_schedule={self.sigma_schedule!r}: choose from {', '.join(SCHEDULES)}")
        if self.eps not in (None, self.sigma):
            raise InputError(f"eps={self.eps!r}: of rewards it is sigma, how far members are from the model")
        if self.members < 2:
            raise InputError(f"members={self.members}: members are compared with each other; give 2 or more")
        own = {name: value for name, value in self.method_options.items() if name not in Enhancements.names()}
        queries = queries_of(self.members, self.method, **own)
        if self.queries not in (None, queries):
            raise InputError(f"queries={self.queries!r}: of rewards it is members, the perturbed models a step")
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: the prompts of a step are answered together, as "
                "many at a time as slots; give per_device_train_batch_size"
            )
        self.eps, self.queries = self.sigma, None if not isinstance(self.method, str) else queries
        if self.learning_rate is None:
            self.lr = AUTO if self.lr is None else self.lr
            self.learning_rate = 0.0  # not asked for
        super().__post_init__()

    def factor(self, step: int, steps: int) -> float:
        """What σ and the learning rate have of their first values at a step (from 0) of so many: from 1 by a cosine to 1/2.

        >>> RewardTrainingArguments.factor(RewardTrainingArguments, 5, 10)
        0.75
        """
        if self.sigma_schedule == "constant" or steps <= 0:
            return 1.0
        return 0.75 + 0.25 * math.cos(math.pi * min(step, steps) / steps)
