"""The options of every command: one definition for flags, YAML files and the record of a run. Loads no torch.

commands.py has the options, a model a command, reward.py those of rewards; checks.py reads them and says what does not go together.
"""

from zotune.files.checked import Options
from zotune.options.checks import resolve
from zotune.options.commands import (
    CompareConfig,
    DataOptions,
    EstimateConfig,
    EvalConfig,
    MergeConfig,
    ModelOptions,
    PredictConfig,
    PreviewConfig,
    ReplayConfig,
    RowOptions,
    RunOptions,
    SweepConfig,
    TrainConfig,
)
from zotune.options.reward import RewardConfig
from zotune.options.step import StepOptions

__all__ = [
    "CompareConfig",
    "DataOptions",
    "EstimateConfig",
    "EvalConfig",
    "MergeConfig",
    "ModelOptions",
    "Options",
    "PredictConfig",
    "PreviewConfig",
    "ReplayConfig",
    "RewardConfig",
    "RowOptions",
    "RunOptions",
    "StepOptions",
    "SweepConfig",
    "TrainConfig",
    "resolve",
]
