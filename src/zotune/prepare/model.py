"""The model, the tokenizer and the encoder that options name, and what models of a kind cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from zotune.errors import InputError
from zotune.models.heads import head_names, is_named, label_names, outputs_of
from zotune.models.ids import agree, embedding_rows
from zotune.models.kinds import kind_of
from zotune.models.loading import (
    check_architecture,
    find_kind,
    length_limit,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
)
from zotune.options import DataOptions, ModelOptions
from zotune.tasks import Task
from zotune.tasks.encoding import Encoder
from zotune.tasks.objectives import generates
from zotune.tasks.task import MASK


def load(
    options: ModelOptions, task: Task | None = None, *, labels: Sequence[str] = (), seed: int = 0
) -> tuple[nn.Module, Any]:
    """The model and tokenizer that the options name; a fresh head by the seed.

    Of a classifier the outputs are named, in their order, as in the adapter's folder, or the checkpoint if its own head has names
    (they must be the task's, in any order); else by the task, or by `labels`.
    """
    extra: Any = {"gguf_file": options.gguf_file, "trust_remote_code": options.trust_remote_code}
    device = pick_device(options.device)
    adapter = getattr(options, "adapter", None)
    kind, known = find_kind(options.model, options.model_kind, adapter=adapter, **extra)
    if task is not None:
        check_kind(kind, task, getattr(options, "loss", "answer"))
        labels = task.labels
    check_architecture(options.model, kind, **extra)
    if task is not None and kind == "classifier":
        whose = f"--adapter {adapter}" if known else f"--model {options.model}"
        held = known or head_names(load_config(options.model, trust_remote_code=options.trust_remote_code))
        if held:
            outputs_of(held, task.words or {}, whose)
            labels = held if is_named(held) or sorted(held) == sorted(labels) else labels
    tokenizer = load_tokenizer(options.model, **extra)
    common: dict[str, Any] = {"labels": labels or known, "seed": seed, "dtype": options.dtype, "device": device}
    common |= {"quantize": options.quantize, "allow_pickle": options.allow_pickle}
    model = load_model(options.model, kind=kind, **common, **extra)
    agree(model, tokenizer, f"--model {options.model}")
    return model, tokenizer


def check_kind(kind: str, task: Task, loss: str = "answer") -> None:
    """Raises InputError for a task, or a loss, that models of the kind cannot do."""
    if kind != "causal" and generates(loss):
        raise InputError(
            f"--loss {loss}: scores a generated answer, which a {kind} model cannot write; use answer or accuracy"
        )
    if kind != "causal" and task.models:
        given = "conversations" if task.messages_field else "plain text"
        raise InputError(
            f"--model: task {task.name!r} is {given}, which causal models train on; this is a {kind} one: name a causal model, "
            "or say what is asked by --template"
        )
    if kind != "causal" and task.generates:
        raise InputError(f"--model-kind {kind}: task {task.name!r} generates its answers, which a causal model does")
    if kind == "classifier" and not task.labels:
        raise InputError(
            f"--model-kind classifier: task {task.name!r} has no fixed labels to give an output each; "
            "use a causal or masked model"
        )
    if kind != "masked" and task.ask is None and MASK in task.prompt:
        raise InputError(f"--template {task.prompt!r}: {MASK} is for masked models, this is a {kind} one; leave it out")


def encoder_for(model: nn.Module, tokenizer: Any, options: DataOptions, task: Task) -> Encoder:
    kind = kind_of(model)
    outputs: tuple[int, ...] = ()
    if kind == "classifier":
        outputs = outputs_of(label_names(model.config), task.words or {}, "the model")
    return Encoder(tokenizer, length_limit(model), options.max_length, kind, outputs, embedding_rows(model))
