"""`zotune train`: one run, from options to a folder. The parts are elsewhere; this is their order."""

from __future__ import annotations

import json
import math
import operator
import os
import pickle
import platform
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zotune import noise
from zotune.directions.calibration import NormsFolder
from zotune.errors import InputError
from zotune.estimates.memory import AdamCost, adam_cost, peak_bytes, reset_peak
from zotune.estimators import TwoSided
from zotune.models import schemes
from zotune.models.adapters import save
from zotune.models.heads import head_names, is_named, label_names, outputs_of
from zotune.models.kinds import kind_of
from zotune.models.loading import (
    find_kind,
    length_limit,
    load_config,
    load_model,
    load_tokenizer,
    load_weights,
    pick_device,
)
from zotune.models.quantized import base_dtype, library_versions, refuse_rough, weight_bytes
from zotune.models.schemes import get_scheme, trainable_parameters
from zotune.options import DataOptions, ModelOptions, TrainConfig
from zotune.record.replay import fingerprint, machine, start
from zotune.record.trajectory import (
    Header,
    Record,
    Records,
    Trajectory,
    TrajectoryError,
    TrajectoryWriter,
    float32,
    read_file,
)
from zotune.run.card import command, model_card, trajectory_card
from zotune.run.folder import BROKEN, CALIBRATION, CARD, CHECKPOINT, FREE, RunFolder, sync, write_atomically
from zotune.run.guards import Guards
from zotune.step.optimizer import StepRecord, ZeroOrderOptimizer
from zotune.step.probing import sides
from zotune.tasks import Task, ends
from zotune.tasks.encoding import Encoded, Encoder
from zotune.tasks.evaluation import outcome
from zotune.tasks.metrics import figure
from zotune.tasks.objectives import generates, objective
from zotune.tasks.own import data_of, described, encoded
from zotune.tasks.rows import BadRows
from zotune.tasks.splits import TEST_SIZE, VALIDATION_SIZE, Splits, training_splits
from zotune.tasks.task import LOWER_IS_BETTER, MASK
from zotune.trainer import ZOTrainer, ZOTrainingArguments

WINDOW = "window.json"  # of a checkpoint: what the next line of metrics.jsonl is a mean of, so far
UNSEEN = {"deterministic", "log_every"}  # keys that change no step
LONGEST = 8192  # characters of a command that a trajectory's header takes
LENGTHS = 16  # on CUDA batches are padded to a multiple of so many tokens: a captured step serves one shape


class Listener:
    """What a run tells whoever watches it. The command line draws it; this one is silent."""

    def say(self, line: str) -> None: ...
    def prepared(self, ready: Prepared) -> None: ...
    def begin(self, what: str, total: int) -> None: ...
    def advance(self, what: str, done: int, **shown: float) -> None: ...
    def end(self, what: str) -> None: ...


class Interrupted(Exception):
    """The run was asked to stop, and has saved. `code` is the exit code: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Prepared:
    """A model with its scheme on, and the rows that it will see."""

    config: TrainConfig
    task: Task
    model: nn.Module
    tokenizer: Any
    splits: Splits
    bad: BadRows
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]
    unread: str | None = None  # a line on files that are no split's
    base: str = ""  # fingerprint of the model as it was loaded, where a trajectory wants it
    ends: list[int] = field(default_factory=list)  # the tokens that end the answers that are trained

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    def score(self, rows: list[Encoded], listener: Listener, what: str) -> float:
        """The task's metric; see `zotune.tasks.metrics`."""
        listener.begin(what, len(rows))
        found = outcome(
            self.model,
            self.tokenizer,
            self.task,
            rows,
            batch_size=2 * self.config.batch_size,
            pad_id=self.pad_id,
            advance=lambda n: listener.advance(what, n),
        )
        listener.end(what)
        return found.metric(self.task.metric, rows)

    def one_class(self, rows: list[Encoded]) -> float:
        """Percent right by always answering the label that is most frequent among the rows; 0 where nothing is chosen."""
        if self.task.generates or self.task.models:
            return 0.0
        counts: dict[int, int] = {}
        for row in rows:
            counts[row.label] = counts.get(row.label, 0) + 1
        return 100 * max(counts.values()) / len(rows)

    @property
    def cut_rows(self) -> int:
        """Rows that were cut, each once however often it is drawn or scored."""
        drawn, rows = self.splits, [*self.train, *self.validation, *self.test]
        examples = [*drawn.train, *drawn.validation, *drawn.test]
        return len({example.where for example, row in zip(examples, rows, strict=True) if row.cut})

    def adam_cost(self) -> AdamCost:
        longest = max(self.train, key=lambda row: row.tokens)
        asked = objective(self.config.loss, self.task, self.tokenizer, self.pad_id)
        if not asked.differentiable:  # what back-propagation would have to train on instead
            asked = objective("answer", self.task, self.tokenizer, self.pad_id)
        loss, collate = asked.row_loss, asked.collate
        batch = {k: v.to(self.device) for k, v in collate([longest]).items()}
        return adam_cost(self.model, lambda: loss(self.model, batch), self.config.batch_size)


def pad_id(tokenizer: Any) -> int:
    """Any id serves: nothing that a loss reads comes after padding."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


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
    if kind == "classifier" and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_id(tokenizer)  # type: ignore[union-attr]  # a decoder's head finds the last token by it
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
    return Encoder(tokenizer, length_limit(model), options.max_length, kind, outputs)


def prepare(config: TrainConfig) -> Prepared:
    """Data first, since it fails fastest; then the model, the scheme on it, and the rows as ids."""
    task, source = data_of(config)
    if config.balance_classes and (task.generates or task.models):
        raise InputError(f"--balance-classes: task {task.name!r} has no classes")
    asked = objective(config.loss, task, None, 0)  # says at once what does not go together
    if ":" in config.loss and task.generates and task.metric == "f1":
        task = replace(task, metric=config.loss)  # what is trained for also says which step is best
    if not asked.differentiable and (
        config.method.startswith("fo-") or config.method == "forward-grad" or config.hybrid
    ):
        raise InputError(
            f"--loss {config.loss}: has no gradient; method {config.method} needs one (answer, candidates)"
        )
    splits = training_splits(
        task,
        source,
        train_size=config.train_size,
        validation_size=min(task.validation_size or VALIDATION_SIZE, config.eval_size or VALIDATION_SIZE),
        test_size=min(TEST_SIZE, config.eval_size or TEST_SIZE),
        seed=config.seed,
        balanced=config.balance_classes,
    )
    model, tokenizer = load(config, task, seed=config.seed)
    if not config.method.startswith("fo-"):
        refuse_rough(model, config.model)
    recorded = not (config.method.startswith("fo-") or config.hybrid or config.dry_run)
    base = fingerprint(model) if recorded else ""
    transformers.set_seed(config.seed)  # for an adapter's first values
    model = schemes.prepare(model, config.scheme, config.freeze)
    encode = encoder_for(model, tokenizer, config, task)
    (train, train_rows), (validation, validation_rows), (test, test_rows) = (
        encoded(encode, source, part) for part in (splits.train, splits.validation, splits.test)
    )
    learned = ends.taught(train_rows, tokenizer, task.end) if task.generates or task.models else set()
    ends.teach(model, learned)
    splits = replace(splits, train=train, validation=validation, test=test)
    rows = {"train": train_rows, "validation": validation_rows, "test": test_rows}
    return Prepared(
        config,
        task,
        model,
        tokenizer,
        splits,
        source.bad,
        **rows,
        unread=source.unread,
        base=base,
        ends=sorted(learned),
    )


def resolved(config: TrainConfig, model: nn.Module) -> TrainConfig:
    """The options with what depends on the model filled in."""
    scheme = get_scheme(config.scheme)
    return config.model_copy(
        update={
            "lr": config.lr if config.lr is not None else scheme.default_lr(model),
            "eps": config.eps if config.eps is not None else scheme.eps,
            "dtype": config.dtype or str(base_dtype(model)).removeprefix("torch."),
            "eval_every": config.evaluates_every,
        }
    )


def train(config: TrainConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Run, or go on with, the run that the options describe. Returns what result.json holds."""
    listener = listener or Listener()
    check_reporters(config.report_to)
    folder = RunFolder(config.output)
    recorded = config.model_dump(exclude={"resume", "overwrite", "dry_run"})
    asked = {k: v for k, v in recorded.items() if k not in ("lr", "eps", "dtype") or v is not None}
    asked["eval_every"] = config.evaluates_every
    folder.check(asked, resume=config.resume, overwrite=config.overwrite)
    with folder.storing(), folder.locked():
        folder.check(asked, resume=config.resume, overwrite=config.overwrite)
        folder.tidy()
        if config.resume and (done := folder.read_json("result.json")):
            listener.say(f"{folder.path}: this run is finished; nothing to do")
            folder.finish(config.keep is not None)  # as its process may have been killed before
            return done
        with _deterministic(config.deterministic), _tf32(config.tf32):
            ready = prepare(config)
            if config.task is None and config.template is None:
                listener.say(described(ready.task))
            listener.say(ready.splits.described())
            if ready.unread:
                listener.say(ready.unread)
            ready.config = config = resolved(config, ready.model)
            if not config.resume:
                optimizer_for(ready)  # what it refuses leaves no run behind, and none is deleted for it
            if config.overwrite:
                folder.clear()
            folder.write_config(config.model_dump(exclude={"resume", "overwrite", "dry_run"}))
            listener.prepared(ready)
            return _Run(ready, folder, listener).go()


def optimizer_for(ready: Prepared) -> ZeroOrderOptimizer:
    """A run's optimizer, at lr 0. Raises InputError for options that do not go together."""
    config = ready.config
    try:
        return ZeroOrderOptimizer(
            ready.model, config.method, lr=0.0, eps=config.eps or 1e-3, direction=config.direction, queries=config.queries,
            groups=config.groups, rank=config.rank, fold_every=config.fold_every, rounding=config.rounding,
            weight_decay=config.weight_decay, engine=config.engine,
            **config.step_options | ({"fo_lr": 0.0} if config.hybrid else {}),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None


def check_reporters(names: Sequence[str]) -> None:
    """Raises InputError for a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([] if name in ("none", "all") else [name]):
                callback()
        except (ValueError, RuntimeError, ImportError, AssertionError) as error:
            raise InputError(f"--report-to {name}: {str(error).splitlines()[0]}") from None


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms of torch that give the same bits each time; what has none is refused."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a debugging aid that writes all scratch once more
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(f"--deterministic: {str(error).split('. ')[0]}; run without it") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Tensor cores for products of float32 tensors; weights, noise and updates stay float32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, wanted or matmul.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@dataclass
class _Run:
    ready: Prepared
    folder: RunFolder
    listener: Listener
    stop: int | None = None
    peak: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    trajectory: TrajectoryWriter | None = None

    def go(self) -> dict[str, Any]:
        ready, config, folder = self.ready, self.ready.config, self.folder
        began = time.monotonic()
        self.checkpoint = checkpoint = folder.last_checkpoint()
        fresh: dict[str, Any] = {"resumed_at": [], "wall_seconds": 0.0}
        self.progress = fresh | folder.read_json("progress.json")
        self.earlier = self.progress["wall_seconds"]
        self.began = began

        reset_peak(ready.device)
        if "test_before" not in self.progress:
            self.progress["test_before"] = ready.score(ready.test, self.listener, "test, before")
            self.progress["evaluation_peak_bytes"] = peak_bytes(ready.device)
            reset_peak(ready.device)
            folder.write_json("progress.json", self.progress)
        trainer = self._trainer()
        try:
            with self._signals():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if self.trajectory is not None:
                self.trajectory.close()
        self.listener.end("train")
        if self.stop is not None:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {config.steps}, saved; "
                "go on with the same command and --resume",
                128 + self.stop,
            )
        return self._finish(trainer)

    def _finish(self, trainer: _TaskTrainer) -> dict[str, Any]:
        ready, config, folder = self.ready, self.ready.config, self.folder
        chosen = int(trainer.state.best_global_step or trainer.state.global_step)
        trainer.load_best(folder / f"{CHECKPOINT}{chosen}")
        test_after = ready.score(ready.test, self.listener, "test, after")
        if self.trajectory is not None:
            with TrajectoryWriter.resume(folder / "trajectory.zot", trainer.state.global_step) as trajectory:
                trajectory.mark_chosen(chosen)
        cost = ready.adam_cost()
        weights = weight_bytes(ready.model)
        optimizer = trainer.zo_optimizer
        result = {
            "task": ready.task.name,
            "metric": ready.task.metric,
            "test_before": self.progress["test_before"],
            "test_after": test_after,
            "test_split": ready.splits.test_split,
            "test_rows": len(ready.test),
            "train_rows": len(ready.train),
            "validation_rows": len(ready.validation),
            "rows_given": dict(ready.splits.given),
            "one_class": ready.one_class(ready.test),
            "validation_best": trainer.state.best_metric,
            "steps": trainer.state.global_step,
            "chosen_step": chosen,
            "resumed_at": self.progress["resumed_at"],
            "skipped_steps": optimizer.skipped_steps,
            "cut_rows": ready.cut_rows,
            "bad_rows": len(ready.bad.said),
            "stopped_early": trainer.state.global_step < config.steps,
            "forward_passes": optimizer.forward_passes,
            "trainable_parameters": trainable_parameters(ready.model),
            "wall_seconds": round(self._wall(), 3),
            "peak_memory_bytes": self.peak,
            "evaluation_peak_bytes": self.progress.get("evaluation_peak_bytes"),
            "state_bytes": optimizer.state_bytes,
            "adam_memory_bytes": weights + cost.total,
            "method": config.method,
            "scheme": config.scheme,
            "engine": optimizer.engine.name,
            "lr": config.lr,
            "eps": config.eps,
            "dtype": config.dtype,
            "device": device_name(ready.device),
            "model": config.model,
            "seed": config.seed,
            "versions": versions(),
        }
        with folder.staged("model") as path:
            save_model(ready, path, result)
        if self.trajectory is not None:
            write_atomically(folder / CARD, str(trajectory_card(config, ready.task, result)))
        folder.write_json("result.json", result)  # last: it says that all the rest is there
        folder.finish(config.keep is not None)
        return result

    def _trainer(self) -> _TaskTrainer:
        ready, config = self.ready, self.ready.config
        assert config.lr is not None
        assert config.eps is not None
        args = ZOTrainingArguments(
            output_dir=str(self.folder.path),
            method=config.method,
            method_options=config.step_options,
            calibration_rows=config.calibration_rows or ZOTrainingArguments.calibration_rows,
            eps=config.eps,
            direction=config.direction,
            queries=config.queries,
            groups=config.groups,
            rank=config.rank,
            fold_every=config.fold_every,
            rounding=config.rounding,
            engine=config.engine,
            learning_rate=config.lr,
            lr_scheduler_type=config.lr_schedule,
            weight_decay=config.weight_decay,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            seed=config.seed,
            logging_steps=config.log_every,
            eval_strategy="steps",
            eval_steps=config.evaluates_every,
            save_strategy="steps",
            save_steps=config.saves_every,
            metric_for_best_model=ready.task.metric,
            greater_is_better=ready.task.metric not in LOWER_IS_BETTER,
            remove_unused_columns=False,
            dataloader_pin_memory=ready.device.type == "cuda",
            disable_tqdm=True,
            report_to=config.report_to,
            use_cpu=ready.device.type == "cpu",
        )
        multiple = LENGTHS if ready.device.type == "cuda" else 1
        asked = objective(config.loss, ready.task, ready.tokenizer, ready.pad_id, multiple)
        trainer = _TaskTrainer(
            run=self,
            model=ready.model,
            args=args,
            train_dataset=ready.train,
            eval_dataset=ready.validation,
            data_collator=asked.collate,
            row_loss=asked.row_loss,
            unpadded=objective(config.loss, ready.task, ready.tokenizer, ready.pad_id).collate,
        )
        try:
            optimizer = trainer.create_optimizer()
        except ValueError as error:
            raise InputError(str(error)) from None
        assert isinstance(optimizer, ZeroOrderOptimizer)
        if config.engine == "auto":
            self.listener.say(f"engine {optimizer.chosen_engine}")
        optimizer.pairs = config.pairs // config.queries
        optimizer.norms = NormsFolder(self.folder / CALIBRATION)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.recorder = _Recorder(self, trainer)
        trainer.add_callback(trainer.recorder)
        if not any(group.get("first_order") for group in optimizer.param_groups):
            self.header = self._header(optimizer)  # now: of the first values of what trains
        if config.early_stop is not None:
            trainer.add_callback(_EarlyStop(config.early_stop))
        return trainer

    header: Header | None = None  # None: a step by back-propagation is no list of scalars

    def open_trajectory(self, step: int) -> Records | None:
        """Ready for writing. Returns what a killed run has recorded, if it can be applied again to the bit.

        step: the checkpoint's. Steps behind it that are in the file need no forward pass: they are applied from there.
        """
        if self.header is None:
            return None
        path, sync_every = self.folder / "trajectory.zot", self.ready.config.sync_every
        base: dict[str, Any] = self.header.base
        recorded = readable(path, step) if step or path.exists() else None
        same = recorded is not None and recorded.header.encode() == self.header.encode()
        same = (
            same and self.ready.config.mask != "wanda"
        )  # its masks cost forward passes, which are counted as they are made
        if step and recorded and recorded.header.base.get("sha256") != base["sha256"]:
            raise InputError(f"--model {self.ready.config.model}: its weights are not those that the run began with")
        if step == 0 and not same:
            path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / CALIBRATION, ignore_errors=True)
            self.trajectory = TrajectoryWriter.create(path, self.header, sync_every=sync_every)
            return None
        assert recorded is not None
        found = recorded.records if same else None
        reached = max(step, len(found or ()))
        self.trajectory = TrajectoryWriter.resume(path, reached, sync_every=sync_every)
        return found

    def _header(self, optimizer: ZeroOrderOptimizer) -> Header:
        config, kind = self.ready.config, kind_of(self.ready.model)
        labels = label_names(self.ready.model.config) if kind == "classifier" else self.ready.task.labels
        return Header(
            noise_version=noise.NOISE_VERSION,
            direction=config.direction,
            method=config.method,
            seed=config.seed,
            planned_steps=config.steps,
            pairs=config.pairs * len(optimizer.blocks),
            groups=len(optimizer.param_groups),
            decay=tuple(group["weight_decay"] for group in optimizer.param_groups),
            method_options=config.step_options
            | {
                "eps": config.eps,
                "queries": config.queries,
                "groups": config.groups,
                "rank": config.rank,
            }
            | ({"fold_every": config.fold_every} if config.fold_every > 1 else {})
            | ({"rounding": config.rounding} if config.rounding != "nearest" else {}),
            dtype=str(config.dtype),
            engine=optimizer.engine.name,
            base={
                "name": config.model,
                "revision": getattr(self.ready.model.config, "_commit_hash", None),
                "gguf_file": config.gguf_file,
                "scheme": config.scheme,
                "freeze": config.freeze,
                "kind": kind,
                "labels": labels,  # of a classifier, its outputs' names in their order
                "sha256": self.ready.base,
                **({"start": start(self.ready.model)} if config.scheme != "full" else {}),
                "machine": machine(self.ready.device) | library_versions(self.ready.model),
            }
            | ({"quantize": config.quantize} if config.quantize else {}),
            task=self.ready.task.name,
            versions=versions(),
            extra=({"command": said} if len(said := command(config, FREE | UNSEEN)) <= LONGEST else {})
            | ({"ends": self.ready.ends} if self.ready.ends else {}),
        )

    def _wall(self) -> float:
        return self.earlier + time.monotonic() - self.began

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the step that runs, then save. A second one is not caught."""

        def stop(number: int, frame: Any) -> None:
            self.stop = number
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, stop)
        except ValueError:  # not the main thread: whoever runs us has the signals
            pass
        try:
            yield
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)


def readable(path: Path, step: int) -> Trajectory | None:
    """What can be read of a run's trajectory: up to any damage, but `step` steps at least. None where that is none."""
    try:
        return read_file(path)
    except TrajectoryError as error:
        if error.steps is not None and error.steps >= step:
            return read_file(path, until=error.steps)
        if step:
            raise
        return None


class _TaskTrainer(ZOTrainer):
    """Evaluation by the task's metric; of checkpoints equal on validation the latest is the best; these are never half there."""

    model: nn.Module
    recorder: _Recorder

    def __init__(self, *args: Any, run: _Run, unpadded: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run, self._metric, self._unpadded = run, f"eval_{run.ready.task.metric}", unpadded
        self.recorded: Records | None = None  # steps that were taken before a kill

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A step that the trajectory has already is applied from there, with no forward pass."""
        optimizer, step = self.zo_optimizer, self.zo_optimizer.steps
        if self.recorded is None or step >= len(self.recorded) or not self.accelerator.sync_gradients:
            if step == 0 and self.run.header is not None and self.args.gradient_accumulation_steps == 1:
                with torch.no_grad():  # once, to see whether probes see the same loss
                    rows = self._rows_of(model.eval())(self._prepare_inputs(inputs))
                self.recorder.guards.at_rest = float(rows.double().mean())
            return super().training_step(model, inputs, num_items_in_batch)
        batches, self._micro_batches = len(self._micro_batches) + 1, []
        record = self.recorded[step]
        optimizer.apply_record(record)
        optimizer.forward_passes += optimizer.forwards_a_step * batches
        losses_P, g_GQ = (record.loss_plus, record.loss_minus), (record.g,) * len(record.lr)
        optimizer.took(StepRecord(step, losses_P, g_GQ, record.lr, record.decay, record.skipped, record.choice))
        return torch.tensor((record.loss_plus + record.loss_minus) / 2, device=self.args.device)

    def calibration_batch(self, row: Any) -> Any:
        return self._unpadded([row])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer would take one step more of a run that was killed after its last."""
        patience = self.run.ready.config.early_stop
        early = patience is not None and _EarlyStop(patience).reached(self.args, self.state)
        if self.state.global_step < self.state.max_steps and not early:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._settle()
        ready = self.run.ready
        metrics = {self._metric: ready.score(ready.validation, self.run.listener, "validation")}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def load_best(self, checkpoint: Path) -> None:
        """Tensor by tensor into the weights that are there: no second copy of them in memory."""
        if not load_weights(self.model, checkpoint):
            self.state.best_model_checkpoint = str(checkpoint)
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_weights(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _state_of(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _state_of(checkpoint):
            super()._load_rng_state(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if metrics[self._metric] == self.state.best_metric:
            self.state.best_metric = None
        better = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= better  # whatever --save-every says
        return better

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What it relies on goes to the disk before it, and older ones after it."""
        folder = self.run.folder
        self.recorder.sync()
        with folder.staged(f"{CHECKPOINT}{self.state.global_step}") as path:
            super()._save_checkpoint(model, trial)
            (path / WINDOW).write_text(json.dumps(self.recorder.window()), encoding="utf-8")
        folder.keep_checkpoints(self.run.ready.config.keep or 1, self.state.best_global_step)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.folder.staging)


@contextmanager
def _state_of(checkpoint: str | None) -> Iterator[None]:
    """A checkpoint's state that is damaged, or holds more than numbers, as a line; torch reads it with weights_only."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno in BROKEN:
            raise
        said = type(error).__name__  # torch's own message recommends to unpickle it
        raise InputError(
            f"{checkpoint}: its state cannot be read ({said}); delete this folder and go on: an older checkpoint, or the "
            "trajectory alone, serves --resume"
        ) from error


class _EarlyStop(transformers.TrainerCallback):
    """Ends training after so many evaluations in a row none of which was better than all before it.

    It counts in the log that checkpoints hold, so that a resumed run ends where a whole one does.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reached(args, state):
            control.should_training_stop = True

    def reached(self, args: Any, state: Any) -> bool:
        name = f"eval_{args.metric_for_best_model}"
        better = operator.gt if args.greater_is_better else operator.lt
        best, since = math.nan, 0
        for value in (line[name] for line in state.log_history if name in line):
            best, since = (value, 0) if best != best or better(value, best) else (best, since + 1)
        return since >= self.patience


class _Recorder(transformers.TrainerCallback):
    """Writes the trajectory and metrics.jsonl, shows progress, and passes on a request to stop."""

    def __init__(self, run: _Run, trainer: _TaskTrainer) -> None:
        self.run, self.trainer = run, trainer
        self.path = run.folder / "metrics.jsonl"
        self.guards = Guards(run.listener.say)
        self.losses: list[float] = []  # since the last line
        # seconds from a step's end to the next one's, evaluation and checkpoints left out; that is a step's time on CUDA too,
        # where a step is given to the device before the last one is done
        self.took: list[float] = []
        self.ended: float | None = None
        self.g: float | None = None  # of the last step, the mean over its pairs
        self.line: dict[str, Any] = {}
        self.validation: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, step = self.run, state.global_step
        self.trainer.recorded = recorded = run.open_trajectory(step)
        if run.checkpoint is not None:
            window = run.folder.read_json(f"{run.checkpoint.name}/{WINDOW}")
            self.losses, self.guards.g = window.get("losses", []), window.get("g", [])
            self.guards.apart = window.get("apart", [])
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_atomically(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        if reached := max(step, len(recorded or ())):
            again = f"; {reached - step} of them from the trajectory" if reached > step else ""
            run.listener.say(f"going on after step {reached} of {state.max_steps}{again}")
            run.progress["resumed_at"].append(reached)
            run.folder.write_json("progress.json", run.progress)
        optimizer = self.trainer.zo_optimizer
        if run.header is not None and optimizer.engine.name in (
            "sequential",
            "dual",
        ):  # they add ε·z to the weights themselves
            self.guards.weigh(optimizer.engine.directions.params, optimizer.param_groups[0]["eps"])
        optimizer.watch = self.see
        run.listener.begin("train", state.max_steps)
        run.listener.advance("train", step)

    def see(self, last: StepRecord) -> None:
        """A step that was taken; on CUDA the next one may be under way."""
        run, step, loss = self.run, last.step + 1, last.loss
        if run.trajectory is not None:
            record, written = self._record(last), self.trainer.recorded
            if written is None or last.step >= len(written):
                run.trajectory.append(record)
            # as they are recorded, so that a line is the same whether its steps were taken or applied from the file
            plus, minus = float32(record.loss_plus), float32(record.loss_minus)
            g_Q = tuple(map(float32, record.g))
            self.g = sum(g_Q) / len(g_Q)
            loss = (plus + minus) / 2 if isinstance(self.trainer.zo_optimizer.method.estimator, TwoSided) else minus
            if not last.skipped:
                self.guards.see(step, plus, minus, g_Q)
        self.losses.append(loss)
        run.listener.advance("train", 1, loss=loss, **self.validation)
        if last.skipped:
            run.listener.say(f"step {step}: the loss is not finite; the step is skipped")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run
        run.peak = max(run.peak, peak_bytes(run.ready.device))
        now = time.perf_counter()
        if self.ended is not None:
            self.took.append(now - self.ended)
        last_one = state.global_step == state.max_steps
        if state.global_step % args.eval_steps == 0 or last_one:
            control.should_log = control.should_evaluate = True
        control.should_save = state.global_step % args.save_steps == 0 or last_one
        if run.stop is not None:
            control.should_save = control.should_training_stop = True
        if state.global_step % args.logging_steps == 0 or control.should_log or control.should_save:
            self.trainer.zo_optimizer.land()
        self.ended = None if control.should_evaluate or control.should_save else now

    def _record(self, last: StepRecord) -> Record:
        optimizer, written = self.trainer.zo_optimizer, self.trainer.recorded
        if written is not None and last.step < len(written):
            return written[last.step]
        plus, other = sides(optimizer.method.estimator, last.losses_P)
        return Record(
            step=last.step,
            loss_plus=_over_rows(plus or other, last.shares),  # forward mode: both are L(θ)
            loss_minus=_over_rows(other, last.shares),
            g=last.g_GQ[0],
            lr=last.lr_G,
            decay=last.decay_G,
            skipped=last.skipped,
            choice=last.choice,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            self._write()
            losses, self.losses = self.losses, []
            took, self.took = self.took, []
            self.line = {
                "step": state.global_step,
                "loss": sum(losses) / len(losses),
                "lr": logs["learning_rate"],
                "projected_gradient": self.g if self.run.trajectory else logs.get("projected_gradient"),
                **self.guards.statistics(),
                "forward_passes": logs["forward_passes"],
                "skipped_steps": logs["skipped_steps"],
                "seconds": round(self.run._wall(), 3),
                **({"step_seconds": round(median(took), 6)} if took else {}),
            }

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak(self.run.ready.device)  # the peak is that of the steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        reset_peak(self.run.ready.device)
        name, value = next(iter(metrics.items()))
        self.validation = {self.run.ready.task.metric: value}
        self.line[name.replace("eval_", "validation_")] = value
        shown = figure(self.run.ready.task.metric, value)
        self.run.listener.say(f"step {state.global_step}: validation {shown}")
        self._write()

    def sync(self) -> None:
        """All lines and steps so far are on the disk."""
        self._write()
        if self.path.exists():
            sync(self.path)
        if self.run.trajectory is not None:
            self.run.trajectory.sync()
        self.run.progress["wall_seconds"] = self.run._wall()
        self.run.folder.write_json("progress.json", self.run.progress)

    def window(self) -> dict[str, list[float]]:
        """What the next line is a mean of, so far."""
        return {"losses": self.losses, "g": self.guards.g, "apart": self.guards.apart}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self.line:
            finite = {
                k: (v if v is not None and v == v and abs(v) != float("inf") else None) for k, v in self.line.items()
            }
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
            self.line = {}


def _over_rows(losses: list[float], shares: Sequence[int]) -> float:
    """The mean over the batch of the losses of its directions' rows, query by query."""
    if len(shares) == 1:
        return sum(losses) / len(losses)
    weights = list(shares) * (len(losses) // len(shares))
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


def _step_of(line: str) -> float:
    """A line's step; beyond all steps where the line is torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


def save_model(ready: Prepared, path: Path, result: Mapping[str, Any]) -> None:
    """The chosen weights as `from_pretrained` (or PEFT) loads them, with tokenizer and model card."""
    save(ready.model, ready.tokenizer, path)
    ends.save_beside_adapter(ready.model, path)
    model_card(ready.config, ready.task, result).save(path / "README.md")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    names = ("zotune", "torch", "transformers", "peft", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def find_result(path: str | Path) -> dict[str, Any]:
    """A finished run's result. Raises InputError where there is none."""
    result = RunFolder(path).read_json("result.json")
    if not result:
        raise InputError(f"{path}: no result.json in it")
    return result
