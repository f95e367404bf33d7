"""What a Trainer may be told that a zeroth-order step would ignore, or do wrong: refused at construction, each in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from torch import nn

from zotune.directions.shards import is_laid_out
from zotune.errors import InputError
from zotune.methods import Method
from zotune.step.enhancements import Enhancements

# Argument of TrainingArguments → why it is refused where it is set to more than its default, and what to do.
REFUSED = {
    "fp16": "scales gradients, and there are none here; load the model with dtype=torch.float16",
    "max_grad_norm": "a zeroth-order step has no gradient to clip; leave it at 0 (g_clip in method_options clips projected ones)",
    "optim": "the method is the optimizer; name one by method= (`zotune list methods`)",
    "optim_args": "the method is the optimizer; its options are method_options=",
    "optim_target_modules": "the method is the optimizer; requires_grad says what it trains",
    "adam_beta1": "is of an optimizer that takes gradients; zo-adam's is method_options={'beta1': …}",
    "adam_beta2": "is of an optimizer that takes gradients; zo-adam's is method_options={'beta2': …}",
    "adam_epsilon": "is of an optimizer that takes gradients; zo-adam's is method_options={'adam_eps': …}",
    "neftune_noise_alpha": "is noise of training mode, and steps are taken in eval mode; leave it out",
    "torch_compile": "a compiled forward hides its parameters from the perturbation; leave it out",
    "torch_compile_backend": "a compiled forward hides its parameters from the perturbation; leave it out",
    "torch_compile_mode": "a compiled forward hides its parameters from the perturbation; leave it out",
    "use_liger_kernel": "its kernels take parameters past the perturbation, to compute gradients that nobody needs; leave it out",
    "activation_checkpointing": "no backward keeps activations, and eval mode has no checkpointing; leave it out",
    "gradient_checkpointing": "no backward keeps activations, and eval mode has no checkpointing; leave it out",
    "torch_empty_cache_steps": "is of the Trainer's own step, which this one replaces; leave it out",
    "auto_find_batch_size": "would begin again on weights that have moved; `zotune estimate` says which batch fits",
    "deepspeed": "shards weights and states for a backward that is not there; leave it out",
    "fsdp": "is of the Trainer's own steps; leave it out, or lay the model out by fully_shard and step it in a loop of your own",
    "parallelism_config": "each process would move its weights by losses of its own; run one process",
}  # fmt: skip


def refuse_arguments(args: transformers.TrainingArguments) -> None:
    """Raises InputError for the first argument that would be ignored. What its class has by default was not asked for."""
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    for name, why in REFUSED.items():
        value = getattr(args, name, None)
        if value and value != defaults.get(name):
            raise InputError(f"{name}={getattr(value, 'value', value)!r}: {why}")


def refuse_trainer(model: Any, args: transformers.TrainingArguments, row_loss: Any, given: dict[str, Any]) -> None:
    """The same of what the Trainer is given beside its arguments, and of where it runs. given: its keywords by name."""
    refuse_arguments(args)
    if getattr(args, "mixed_precision", "no") == "fp16":
        raise InputError(f"ACCELERATE_MIXED_PRECISION=fp16: {REFUSED['fp16']}")
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise InputError(f"ACCELERATE_USE_DEEPSPEED: {REFUSED['deepspeed']}")
    optimizer, schedule = given.get("optimizers") or (None, None)
    if optimizer is not None or given.get("optimizer_cls_and_kwargs") is not None:
        kind = optimizer if optimizer is not None else given["optimizer_cls_and_kwargs"][0]
        name = getattr(kind, "__name__", type(kind).__name__)
        raise InputError(
            f"optimizers: {name} would not be asked for a step; leave it out, and name a method by method="
        )
    if schedule is not None:
        raise InputError(
            f"optimizers: {type(schedule).__name__} drives another optimizer's rate; use lr_scheduler_type, or override "
            "create_scheduler"
        )
    if row_loss is not None and given.get("compute_loss_func") is not None:
        raise InputError("compute_loss_func: row_loss is what steps are taken by; give one of the two")
    if row_loss is not None and args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor}: row_loss is taken as it is; smooth there, or leave row_loss out"
        )
    if isinstance(model, nn.Module):
        _refuse_model(model)


def refuse_shared(method: Method, enhancements: Enhancements, processes: int) -> None:
    """Raises InputError for what several processes cannot do with rows of their own each."""
    if method.kind != "zeroth-order" or enhancements.hybrid is not None:
        raise InputError(f"{processes} processes: exchange losses, and this method has gradients; run one process")
    if method.needs_rows:
        raise InputError(f"{processes} processes: an update of this method needs all rows of its step; run one process")


def _refuse_model(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise InputError(
            f"model: compiled; {REFUSED['torch_compile_mode'].partition(';')[0]}: give the model itself, model._orig_mod"
        )
    if isinstance(model, nn.DataParallel):
        raise InputError("model: DataParallel's replicas are copies that no perturbation reaches; give model.module")
    if any(map(is_laid_out, model.parameters())):
        raise InputError(
            "model: its weights lie over several processes, which the Trainer would feed and save as if each had all; step it by "
            "ZeroOrderOptimizer(model, …) in a loop of your own"
        )
    compiled = next((name for name, m in model.named_modules() if getattr(m, "_compiled_call_impl", None)), None)
    if compiled is not None:
        raise InputError(
            f"model: {compiled or 'its forward'} is compiled in place; {REFUSED['torch_compile_mode'].partition(';')[0]}: "
            "load it again, without .compile()"
        )
