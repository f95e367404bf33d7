"""A step's options stand once: the flags' model is that of the optimizer's keywords, the Trainer's arguments and the record."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from torch import nn

from zotune import ZeroOrderOptimizer, ZOTrainingArguments
from zotune.bench.suite import PROBE_OPTIONS
from zotune.errors import OptionError
from zotune.options import StepOptions, TrainConfig
from zotune.options.step import METHOD_OPTIONS
from zotune.step.choices import TOGETHER, Choices
from zotune.step.enhancements import Enhancements
from zotune.trainer.arguments import ZO_FIELDS

FIELDS = StepOptions.model_fields
OF_A_RUN = {
    "seed",
    "max_skipped",
    "total_steps",
    "workers",
}  # that an optimizer takes, and the command line has elsewhere or not
OF_THE_TRAINER = {"method_options", "max_skipped", "calibration_rows"}


def test_the_optimizer_takes_every_option_of_a_step_and_no_other():
    named = set(inspect.signature(ZeroOrderOptimizer.__init__).parameters) - {"self", "params", "options"}
    beyond = {*METHOD_OPTIONS, *Enhancements.names()}
    assert named | beyond == set(FIELDS) | OF_A_RUN
    assert not named & beyond


def test_the_trainers_arguments_are_options_with_the_same_defaults():
    assert set(ZO_FIELDS) - OF_THE_TRAINER <= set(FIELDS)
    held = {f.name: f.default for f in dataclasses.fields(ZOTrainingArguments)}
    for name in set(ZO_FIELDS) - OF_THE_TRAINER:
        assert held[name] == FIELDS[name].default, name


def test_a_probe_takes_every_option_that_changes_a_step():
    assert set(FIELDS) - {"lr", "eps"} <= set(PROBE_OPTIONS)


def test_choices_are_of_options_and_what_does_not_go_together_names_one():
    taken = {f.name for f in dataclasses.fields(Choices)} - {"name", "seed", "max_skipped", "enhancements", "scheme"}
    assert taken == set(FIELDS) - {*METHOD_OPTIONS, *Enhancements.names(), "queries"}
    known = {*FIELDS, "scheme"}
    assert all(row.option in known for row in TOGETHER if isinstance(row.option, str))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"queries": 3, "groups": "batch", "rank": 2, "estimator": "one-sided", "forward_tokens": 64},
        {"method": "zo-adam", "beta1": 0.5, "state_dtype": "bfloat16", "rounding": "compensated", "g_clip": 3.0},
        {"method": "fzoo", "direction": "gaussian", "fold_every": 2},
        {"sparsity": 0.5, "mask": "magnitude", "mask_refresh": 4},
        {"hybrid": 0.5, "fo_lr": 1e-3, "eps": 1e-2},
    ],
    ids=str,
)
def test_a_record_s_options_make_the_optimizer_again(given):
    config = TrainConfig(model="m", task="sst2", output="o", **given)
    model = nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    first = ZeroOrderOptimizer(model, config.method, lr=0.0, **config.optimizer_options)
    own = {"direction": config.direction} if config.direction else {}
    again = ZeroOrderOptimizer(model, config.method, lr=0.0, **own, **config.recorded_options)
    assert again.choices == first.choices
    assert (again.method, again.direction, again.enhancements) == (first.method, first.direction, first.enhancements)
    assert torch.tensor(config.directions_a_row) == first.method.queries


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1"])
def test_a_rate_that_is_no_finite_number_is_refused_of_a_group_too(name, value):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(OptionError, match=f"^{name}=.*: must be"):
        ZeroOrderOptimizer(model, **{name: value})
    with pytest.raises(OptionError, match=f"^{name}=.*: must be"):
        ZeroOrderOptimizer([{"params": model.parameters(), name: value}])
    optimizer = ZeroOrderOptimizer(model)
    with pytest.raises(OptionError, match=f"^{name}=.*: must be"):
        optimizer.add_param_group({"params": torch.nn.Linear(1, 1).parameters(), name: value})


@pytest.mark.parametrize("name", ["queries", "rank", "fold_every", "forward_tokens", "max_skipped"])
@pytest.mark.parametrize("value", ["two", "2", 0, 1.5, math.inf, math.nan, True])
def test_a_count_that_is_none_is_refused_by_its_name(name, value):
    with pytest.raises(OptionError, match=f"{name}=.*a whole number from 1"):
        ZeroOrderOptimizer(nn.Linear(2, 2), **{name: value})
