"""`zotune train`: one run, from options to a folder. The parts are elsewhere; this is their order."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from torch import nn

from zotune import noise
from zotune.config import DataOptions, ModelOptions, TrainConfig
from zotune.engines.probing import sides
from zotune.errors import InputError
from zotune.folder import RunFolder
from zotune.guards import Guards
from zotune.memory import AdamCost, adam_cost, peak_bytes, reset_peak
from zotune.models.adapters import save
from zotune.models.kinds import kind_of
from zotune.models.loading import find_kind, length_limit, load_model, load_tokenizer, load_weights, pick_device
from zotune.models.schemes import get_scheme, trainable_parameters
from zotune.optimizer import ZeroOrderOptimizer
from zotune.replay import fingerprint, machine
from zotune.tasks import Task, get_task
from zotune.tasks.encoding import MASK, Encoded, Encoder
from zotune.tasks.evaluation import outcome
from zotune.tasks.objectives import objective
from zotune.tasks.splits import TEST_SIZE, VALIDATION_SIZE, Splits, find_source, training_splits
from zotune.trainer import ZOTrainer, ZOTrainingArguments
from zotune.trajectory import Header, Record, TrajectoryWriter

LENGTHS = 16  # on CUDA batches are padded to a multiple of so many tokens: a captured step serves one shape


class Listener:
    """What a run tells whoever watches it. The command line draws it; this one is silent."""

    def say(self, line: str) -> None: ...
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
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    def score(self, rows: list[Encoded], listener: Listener, what: str) -> float:
        """The task's metric, in percent."""
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
        """Percent right by always answering the label that is most frequent among the rows; 0 for generated answers."""
        if self.task.generates:
            return 0.0
        counts: dict[int, int] = {}
        for row in rows:
            counts[row.label] = counts.get(row.label, 0) + 1
        return 100 * max(counts.values()) / len(rows)

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


def task_of(options: DataOptions) -> Task:
    if options.task is not None:
        return get_task(options.task).aligned(options.alignment)
    assert options.data is not None
    if options.template is None:  # TRL's convention: prompt and completion
        name = Path(options.data).name or options.data
        return Task(name=name, prompt="{prompt}", answer_field="completion")
    return Task(
        name=Path(options.data).name or options.data,
        prompt=options.template,
        words=options.label_words,
        label_field=options.label_field or "label",
        choices_field=options.choices_field,
        answer_field=options.answer_field,
    )


def load(
    options: ModelOptions, task: Task | None = None, *, labels: Sequence[str] = (), seed: int = 0
) -> tuple[nn.Module, Any]:
    """The model and tokenizer that the options name; a classifier with the task's labels, or these, its fresh head by the seed."""
    extra: Any = {"gguf_file": options.gguf_file, "trust_remote_code": options.trust_remote_code}
    device = pick_device(options.device)
    adapter = getattr(options, "adapter", None)
    kind, known = find_kind(options.model, options.model_kind, adapter=adapter, **extra)
    if task is not None:
        check_kind(kind, task)
        labels = task.labels
    tokenizer = load_tokenizer(options.model, **extra)
    common: dict[str, Any] = {"labels": labels or known, "seed": seed, "dtype": options.dtype, "device": device}
    model = load_model(options.model, kind=kind, **common, **extra)
    if kind == "classifier" and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_id(tokenizer)  # type: ignore[union-attr]  # a decoder's head finds the last token by it
    return model, tokenizer


def check_kind(kind: str, task: Task) -> None:
    """Raises InputError for a task that models of the kind cannot do."""
    if kind != "causal" and task.generates:
        raise InputError(f"--model-kind {kind}: task {task.name!r} generates its answers, which a causal model does")
    if kind == "classifier" and not task.labels:
        raise InputError(
            f"--model-kind classifier: task {task.name!r} has no fixed labels to give an output each; "
            "use a causal or masked model"
        )
    if kind != "masked" and task.ask is None and MASK in task.prompt:
        raise InputError(f"--template {task.prompt!r}: {MASK} is for masked models, this is a {kind} one; leave it out")


def encoder_for(model: nn.Module, tokenizer: Any, options: DataOptions) -> Encoder:
    return Encoder(tokenizer, length_limit(model), options.max_length, kind_of(model))


def prepare(config: TrainConfig) -> Prepared:
    """Data first, since it fails fastest; then the model, the scheme on it, and the rows as ids."""
    task = task_of(config)
    asked = objective(config.loss, task, None, 0)  # says at once what does not go together
    if not asked.differentiable and (
        config.method.startswith("fo-") or config.method == "forward-grad" or config.hybrid
    ):
        raise InputError(
            f"--loss {config.loss}: has no gradient; method {config.method} needs one (answer, candidates)"
        )
    splits = training_splits(
        task,
        find_source(task, config.data, config.data_dir, config.columns),
        train_size=config.train_size,
        validation_size=min(task.validation_size or VALIDATION_SIZE, config.eval_size or VALIDATION_SIZE),
        test_size=min(TEST_SIZE, config.eval_size or TEST_SIZE),
        seed=config.seed,
    )
    model, tokenizer = load(config, task, seed=config.seed)
    transformers.set_seed(config.seed)  # for an adapter's first values
    model = get_scheme(config.scheme).prepare(model)
    encode = encoder_for(model, tokenizer, config)
    parts = [[encode(example) for example in part] for part in (splits.train, splits.validation, splits.test)]
    return Prepared(config, task, model, tokenizer, splits, *parts)


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


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the largest parameter: an adapter may have its own."""
    return max(model.parameters(), key=lambda p: p.numel()).dtype


def train(config: TrainConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Run, or go on with, the run that the options describe. Returns what result.json holds."""
    listener = listener or Listener()
    folder = RunFolder(config.output)
    recorded = config.model_dump(exclude={"resume", "overwrite", "dry_run"})
    asked = {k: v for k, v in recorded.items() if k not in ("lr", "eps", "dtype", "eval_every") or v is not None}
    folder.check(asked, resume=config.resume, overwrite=config.overwrite)
    with folder.locked():
        folder.check(asked, resume=config.resume, overwrite=config.overwrite)
        if config.overwrite:
            folder.clear()
        if config.resume and (done := folder.read_json("result.json")):
            listener.say(f"{folder.path}: this run is finished; nothing to do")
            return done
        ready = prepare(config)
        ready.config = config = resolved(config, ready.model)
        folder.write_config(config.model_dump(exclude={"resume", "overwrite", "dry_run"}))
        return _Run(ready, folder, listener).go()


@dataclass
class _Run:
    ready: Prepared
    folder: RunFolder
    listener: Listener
    stop: int | None = None
    peak: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    trajectory: TrajectoryWriter | None = None

    def go(self) -> dict[str, Any]:
        ready, config, folder = self.ready, self.ready.config, self.folder
        began = time.monotonic()
        checkpoint = folder.last_checkpoint()
        if checkpoint is None:
            for name in ("metrics.jsonl", "trajectory.zot"):
                (folder / name).unlink(missing_ok=True)
            self.progress = {"resumed_at": [], "wall_seconds": 0.0, "skipped_steps": 0}
        else:
            self.progress = folder.read_json("progress.json")
            self.progress["resumed_at"].append(int(checkpoint.name.removeprefix("checkpoint-")))
        self.earlier = self.progress["wall_seconds"]
        self.began = began

        reset_peak(ready.device)
        if "test_before" not in self.progress:
            self.progress["test_before"] = ready.score(ready.test, self.listener, "test, before")
            self.progress["evaluation_peak_bytes"] = peak_bytes(ready.device)
            reset_peak(ready.device)
            folder.write_json("progress.json", self.progress)
        trainer = self._trainer()
        with self._signals():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.listener.end("train")
        if self.stop is not None:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {config.steps}, saved; "
                "go on with the same command and --resume",
                128 + self.stop,
            )
        return self._finish(trainer)

    def _finish(self, trainer: ZOTrainer) -> dict[str, Any]:
        ready, config, folder = self.ready, self.ready.config, self.folder
        chosen = int(trainer.state.best_global_step or trainer.state.global_step)
        test_after = ready.score(ready.test, self.listener, "test, after")
        if self.trajectory is not None:
            self.trajectory.mark_chosen(chosen)
            self.trajectory.close()
        cost = ready.adam_cost()
        weights = sum(p.numel() * p.element_size() for p in ready.model.parameters())
        optimizer = trainer.zo_optimizer
        result = {
            "task": ready.task.name,
            "metric": ready.task.metric,
            "test_before": self.progress["test_before"],
            "test_after": test_after,
            "test_split": ready.splits.test_split,
            "test_rows": len(ready.test),
            "one_class": ready.one_class(ready.test),
            "validation_best": trainer.state.best_metric,
            "steps": trainer.state.global_step,
            "chosen_step": chosen,
            "resumed_at": self.progress["resumed_at"],
            "skipped_steps": optimizer.skipped_steps,
            "cut_rows": sum(bool(row.cut) for rows in (ready.train, ready.validation, ready.test) for row in rows),
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
        save_model(ready, folder / "model", result)
        folder.write_json("result.json", result)
        folder.drop_checkpoints()
        return result

    def _trainer(self) -> ZOTrainer:
        ready, config = self.ready, self.ready.config
        assert config.lr is not None
        assert config.eps is not None
        args = ZOTrainingArguments(
            output_dir=str(self.folder.path),
            method=config.method,
            method_options=config.step_options,
            eps=config.eps,
            direction=config.direction,
            queries=config.queries,
            groups=config.groups,
            rank=config.rank,
            engine=config.engine,
            learning_rate=config.lr,
            lr_scheduler_type=config.lr_schedule,
            weight_decay=config.weight_decay,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            seed=config.seed,
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=config.evaluates_every,
            save_strategy="steps",
            save_steps=config.evaluates_every,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=ready.task.metric,
            greater_is_better=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=config.report_to,
            use_cpu=ready.device.type == "cpu",
        )
        multiple = LENGTHS if ready.device.type == "cuda" else 1
        asked = objective(config.loss, ready.task, ready.tokenizer, ready.pad_id, multiple)
        trainer = _TaskTrainer(
            model=ready.model,
            args=args,
            train_dataset=ready.train,
            eval_dataset=ready.validation,
            data_collator=asked.collate,
            row_loss=asked.row_loss,
            score=lambda: ready.score(ready.validation, self.listener, "validation"),
            metric=ready.task.metric,
        )
        try:
            optimizer = trainer.create_optimizer()
        except ValueError as error:
            raise InputError(str(error)) from None
        assert isinstance(optimizer, ZeroOrderOptimizer)
        optimizer.pairs = config.pairs // config.queries
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(_Recorder(self, trainer))
        return trainer

    def open_trajectory(self, optimizer: ZeroOrderOptimizer, step: int) -> None:
        self.trajectory = None
        if any(group.get("first_order") for group in optimizer.param_groups):
            return  # a step by back-propagation is no list of scalars
        path = self.folder / "trajectory.zot"
        if step:
            self.trajectory = TrajectoryWriter.resume(path, step)
            return
        config = self.ready.config
        header = Header(
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
            },
            dtype=str(config.dtype),
            engine=optimizer.engine.name,
            base={
                "name": config.model,
                "revision": getattr(self.ready.model.config, "_commit_hash", None),
                "gguf_file": config.gguf_file,
                "scheme": config.scheme,
                "kind": kind_of(self.ready.model),
                "labels": self.ready.task.labels,
                "sha256": fingerprint(self.ready.model),
                "machine": machine(self.ready.device),
            },
            task=self.ready.task.name,
            versions=versions(),
        )
        self.trajectory = TrajectoryWriter.create(path, header)

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


class _TaskTrainer(ZOTrainer):
    """Evaluation by the task's metric; of checkpoints equal on validation the latest is the best."""

    model: nn.Module

    def __init__(self, *args: Any, score: Any, metric: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._score, self._metric = score, f"eval_{metric}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {self._metric: self._score()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        """Tensor by tensor into the weights that are there: no second copy of them in memory."""
        if not load_weights(self.model, Path(self.state.best_model_checkpoint or "")):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_weights(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if metrics[self._metric] == self.state.best_metric:
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)


class _Recorder(transformers.TrainerCallback):
    """Writes the trajectory and metrics.jsonl, shows progress, and passes on a request to stop."""

    def __init__(self, run: _Run, trainer: ZOTrainer) -> None:
        self.run, self.trainer = run, trainer
        self.path = run.folder / "metrics.jsonl"
        self.guards = Guards(run.listener.say)
        self.line: dict[str, Any] = {}
        self.accuracy: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.run.open_trajectory(self.trainer.zo_optimizer, step)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept))
        self.run.listener.begin("train", state.max_steps)
        self.run.listener.advance("train", step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = self.trainer.zo_optimizer.last
        assert last is not None
        if self.run.trajectory is not None:
            plus, other = sides(self.trainer.zo_optimizer.method.estimator, last.losses_P)
            plus = plus or other  # forward mode: both are L(θ)
            self.run.trajectory.append(
                Record(
                    step=last.step,
                    loss_plus=sum(plus) / len(plus),
                    loss_minus=sum(other) / len(other),
                    g=last.g_GQ[0],
                    lr=last.lr_G,
                    decay=last.decay_G,
                    skipped=last.skipped,
                    choice=last.choice,
                )
            )
        plus, other = sides(self.trainer.zo_optimizer.method.estimator, last.losses_P)
        if plus and other and not last.skipped:
            self.guards.see(state.global_step, fmean(plus), fmean(other), last.g_GQ[0])
        shown = {"loss": last.loss} | ({"accuracy": self.accuracy} if self.accuracy is not None else {})
        self.run.listener.advance("train", 1, **shown)
        self.run.peak = peak_bytes(self.run.ready.device)  # before a checkpoint is mapped to load the best from
        if last.skipped:
            self.run.listener.say(f"step {state.global_step}: the loss is not finite; the step is skipped")
        if state.global_step % args.eval_steps == 0 or state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        if self.run.stop is not None:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            self._write()
            self.line = {
                "step": state.global_step,
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "projected_gradient": logs.get("projected_gradient"),
                **self.guards.statistics(),
                "forward_passes": logs["forward_passes"],
                "skipped_steps": logs["skipped_steps"],
                "seconds": round(self.run._wall(), 3),
            }

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        name, value = next(iter(metrics.items()))
        self.accuracy = value
        self.line[name.replace("eval_", "validation_")] = value
        self.run.listener.say(f"step {state.global_step}: validation {value:.1f}")
        self._write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()
        if self.run.trajectory is not None:
            self.run.trajectory.sync()
        self.run.progress["wall_seconds"] = self.run._wall()
        self.run.folder.write_json("progress.json", self.run.progress)

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


def save_model(ready: Prepared, path: Path, result: Mapping[str, Any]) -> None:
    """The chosen weights as `from_pretrained` (or PEFT) loads them, with tokenizer and model card."""
    from zotune.card import model_card

    save(ready.model, ready.tokenizer, path)
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
