"""Fine-tune language models without back-propagation, in the memory of inference.

``zotune.ZeroOrderOptimizer`` is a ``torch.optim.Optimizer`` whose ``step(closure)`` needs no backward;
``zotune.ZOTrainer`` is a ``transformers.Trainer`` that steps with it; ``zotune.train``, ``compare``, ``evaluate`` and
``predict`` are the commands as functions. Names load on first use, so that ``import zotune`` and ``zotune --help`` start
without torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.api import compare, evaluate, predict, train
    from zotune.errors import InputError, NonFiniteLoss
    from zotune.methods import Method
    from zotune.step.optimizer import ZeroOrderOptimizer
    from zotune.trainer import ZOTrainer, ZOTrainingArguments

__all__ = [
    "InputError",
    "Method",
    "NonFiniteLoss",
    "ZOTrainer",
    "ZOTrainingArguments",
    "ZeroOrderOptimizer",
    "__version__",
    "compare",
    "evaluate",
    "predict",
    "train",
]

_HOME = {
    "InputError": "zotune.errors",
    "NonFiniteLoss": "zotune.errors",
    "Method": "zotune.methods",
    "ZeroOrderOptimizer": "zotune.step.optimizer",
    "ZOTrainer": "zotune.trainer",
    "ZOTrainingArguments": "zotune.trainer",
    "compare": "zotune.api",
    "evaluate": "zotune.api",
    "predict": "zotune.api",
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
