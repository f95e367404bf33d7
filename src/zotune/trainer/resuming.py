"""What a resumed Trainer takes from its arguments, and what from the checkpoint.

Steps, states, counts and the place in the schedule are the checkpoint's. eps, learning rate and weight decay are the arguments', as
the schedule's shape is; what makes the directions and the rule is refused where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from zotune.errors import InputError
from zotune.step.choices import AUTO

BY_ARGUMENT = ("eps", "weight_decay")  # of a parameter group
RATE = "learning_rate"  # that the schedule begins from


def load_as_told(
    optimizer: torch.optim.Optimizer, schedule: Any, told: Mapping[str, Any], checkpoint: str, load: Callable[[], Any]
) -> None:
    """load: both states, and gives what the checkpoint says it was told ({}: it is older than that is kept).

    optimizer, schedule: as made from the arguments. told: what may not change, by argument. Raises InputError where it has.
    """
    fresh = [{name: group[name] for name in BY_ARGUMENT} for group in optimizer.param_groups]
    base_lrs = list(getattr(schedule, "base_lrs", ()))
    may_change = {RATE} if isinstance(schedule, LambdaLR) else set()  # others have it in their state
    seed = optimizer.param_groups[0]["seed"]
    try:
        was = dict(load()) | {"seed": optimizer.param_groups[0]["seed"]}
    except ValueError as error:
        raise InputError(
            f"{checkpoint}: its parameter groups are not those of these arguments ({str(error).splitlines()[0]}); give the run's "
            "own weight_decay, and train the same parameters"
        ) from error
    if AUTO in (told.get(RATE), was.get(RATE)):
        may_change = set()  # a rate that is found has what the steps told it
    for name, value in {**told, "seed": seed}.items():
        if name not in may_change and name in was and was[name] != value:
            raise InputError(
                f"{checkpoint}: is of a run with {name}={was[name]!r}, the arguments say {value!r}; give the run's own, or "
                "begin a run of its own from these weights"
            )
    for group, given in zip(optimizer.param_groups, fresh, strict=True):
        group.update(given)
    if not isinstance(schedule, LambdaLR) or base_lrs == list(schedule.base_lrs):
        return
    schedule.base_lrs = base_lrs
    rates = [base * factor(schedule.last_epoch) for base, factor in zip(base_lrs, schedule.lr_lambdas, strict=True)]
    for group, base, rate in zip(optimizer.param_groups, base_lrs, rates, strict=True):
        group.update(initial_lr=base, lr=rate)
    schedule._last_lr = rates
