"""`ZOTrainer`: a `transformers.Trainer` that steps without back-propagation."""

from zotune.trainer.arguments import ZOTrainingArguments
from zotune.trainer.groups import parameter_groups
from zotune.trainer.trainer import RowLoss, ZOTrainer

__all__ = ["RowLoss", "ZOTrainer", "ZOTrainingArguments", "parameter_groups"]
