"""Fine-tune language models without back-propagation, in the memory of inference.

``zotune.ZeroOrderOptimizer`` is a ``torch.optim.Optimizer`` whose ``step(closure)`` needs no backward;
``zotune.ZOTrainer`` is a ``transformers.Trainer`` that steps with it, ``zotune.RewardTrainer`` one that raises a reward on what the
model writes; ``zotune.train``, ``reward``, ``compare``, ``evaluate`` and ``predict`` are the commands as functions. Names load on
first use, so that ``import zotune`` and ``zotune --help`` start without torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.api import compare, evaluate, predict, reward, train
    from zotune.errors import InputError, NonFiniteLoss
    from zotune.methods import Method
    from zotune.step.optimizer import ZeroOrderOptimizer
    from zotune.trainer import ZOTrainer, ZOTrainingArguments
    from zotune.trainer.reward_arguments import RewardTrainingArguments
    from zotune.trainer.rewarding import RewardTrainer
    from zotune.workers.group import join

__all__ = [
    "InputError",
    "Method",
    "NonFiniteLoss",
    "RewardTrainer",
    "RewardTrainingArguments",
    "ZOTrainer",
    "ZOTrainingArguments",
    "ZeroOrderOptimizer",
    "__version__",
    "compare",
    "evaluate",
    "join",
    "predict",
    "reward",
    "train",
]

_HOME = {
    "InputError": "zotune.errors",
    "NonFiniteLoss": "zotune.errors",
    "Method": "zotune.methods",
    "RewardTrainer": "zotune.trainer.rewarding",
    "RewardTrainingArguments": "zotune.trainer.reward_arguments",
    "ZeroOrderOptimizer": "zotune.step.optimizer",
    "ZOTrainer": "zotune.trainer",
    "ZOTrainingArguments": "zotune.trainer",
    "compare": "zotune.api",
    "evaluate": "zotune.api",
    "join": "zotune.workers.group",
    "predict": "zotune.api",
    "reward": "zotune.api",
    "train": "zotune.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("zotune")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zotune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
