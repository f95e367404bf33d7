"""The options of each command, with their help; what one option may be is checked here, what goes together in checks.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from zotune.files.checked import Options, Positive
from zotune.options.step import StepOptions, known_name
from zotune.step.choices import AUTO


class ModelOptions(Options):
    model: str = Field(description="hub name or local folder of a pretrained model")
    model_kind: Literal["auto", "causal", "masked", "classifier"] = Field(
        "auto",
        description="causal: the answer follows the prompt; masked: it stands at <mask>; classifier: a head over the labels "
        "[auto: the checkpoint's architecture]",
    )
    gguf_file: str | None = Field(None, description="read the weights from this GGUF file of the model")
    quantize: Literal["int8", "nf4"] | None = Field(
        None, description="quantise the weights to 8 or 4 bits as they are loaded: for lora, prefix and prompt"
    )
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the model")
    allow_pickle: bool = Field(False, description="read weights that are pickled (.bin) where there are no safetensors")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights [default: the checkpoint's own]"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to run")


class RowOptions(Options):
    """Rows of any kind, from files, the hub or memory, and how many of them."""

    data: str | None = Field(
        None,
        description="your own rows: a folder of train/validation/test .jsonl, .json, .csv, .tsv (also as .gz) or .parquet, one "
        "such file, or a hub name",
    )
    subset: str | None = Field(None, description="subset (configuration) of a hub data set")
    template: str | None = Field(
        None, description="prompt over a row's fields, such as '{text} It was' [default: told by the columns]"
    )
    columns: dict[str, str] | None = Field(
        None, description="""JSON, your data's field to the name that is wanted, such as '{"question": "prompt"}'"""
    )
    skip_bad_rows: bool = Field(False, description="leave out rows that cannot be used, and count them")
    batch_size: Positive = Field(16, description="rows a step")
    eval_size: Positive | None = Field(
        None, description="at most so many validation and test rows [default: 500, 1000]"
    )
    max_length: Positive | None = Field(
        None, description="cut longer rows to so many tokens in all, prompts at the start of their longest field"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="seed of the directions, the rows drawn and their order"
    )

    _tables: dict[str, list[Any]] | None = PrivateAttr(None)

    @property
    def tables(self) -> dict[str, list[Any]] | None:
        """Rows in memory by split, instead of those that `data` names; "" for rows without a split."""
        return self._tables

    def set_tables(self, tables: dict[str, list[Any]] | None) -> None:
        self._tables = tables

    @field_validator("label_words", "columns", mode="before", check_fields=False)
    @classmethod
    def _read_words(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                like = (
                    '{"0": "terrible", "1": "great"}' if info.field_name == "label_words" else '{"question": "prompt"}'
                )
                raise ValueError(f"not JSON ({error.msg}); write {like}") from None
        if isinstance(value, Mapping):
            return {str(key).lower() if isinstance(key, bool) else str(key): word for key, word in value.items()}
        return value


class DataOptions(RowOptions):
    task: str | dict[str, Any] | None = Field(
        None, description="built-in task, see `zotune list tasks`, or a task's YAML file (in YAML also the task itself)"
    )
    data_dir: str | None = Field(None, description="folder with TASK/{train,validation,test}.jsonl, instead of the hub")
    label_field: str | None = Field(None, description="field that holds the label [default: label]")
    label_words: dict[str, str] | None = Field(
        None,
        description="""JSON, label to word, such as '{"0": "terrible", "1": "great"}' [default: labels that are words]""",
    )
    choices_field: str | None = Field(None, description="field that holds a row's own choices (multiple choice)")
    answer_field: str | None = Field(
        None, description="field that holds the text to generate, or a list of right ones (generation)"
    )
    text_field: str | None = Field(
        None, description="field whose text is learned as it stands, each token (plain text)"
    )
    alignment: Literal["template", "none"] = Field(
        "template", description="none: the task's prompt without its template's words"
    )
    max_new_tokens: Positive | None = Field(
        None, description="at most so many tokens of a generated answer [default: 50, of a conversation's reply 256]"
    )

    @field_validator("task", mode="before")
    @classmethod
    def _known_task(cls, value: Any) -> Any:
        """A file's task is taken into the options, so that the record of a run is whole."""
        from zotune.tasks import Task, get_task
        from zotune.tasks.files import SUFFIXES, definition

        if value is None:
            return None
        if isinstance(value, str) and value.startswith("{"):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"not JSON ({error.msg})") from None
        if isinstance(value, Task):
            return definition(value)
        if not isinstance(value, (str, Mapping)):
            raise ValueError("give a name, a YAML file, or a task's keys and values")
        task = get_task(value)
        return value if isinstance(value, str) and not value.endswith(SUFFIXES) else definition(task)


class OutputOptions(Options):
    output: str = Field(description="folder of the run")
    resume: bool = Field(False, description="go on with the run in the output folder")
    overwrite: bool = Field(False, description="delete the run in the output folder first")
    dry_run: bool = Field(False, description="show what would be done and what it costs; write nothing")


class RunOptions(StepOptions, OutputOptions, RowOptions, ModelOptions):
    """Of a run that trains, on whatever."""

    scheme: str = Field("full", description="what trains, see `zotune list schemes`")
    freeze: list[str] = Field(
        [], description="parameters that do not train after all: patterns of names, such as '*embed_tokens*,*norm*'"
    )
    tf32: bool = Field(False, description="on CUDA, products of float32 numbers by their first 10 bits: faster")
    steps: Positive = Field(1000, description="updates")
    train_size: Positive = Field(1000, description="at most so many training rows")
    eval_every: Positive | None = Field(
        None,
        description="steps between evaluations on validation [default: a tenth, or so many that they see at most half as many rows "
        "as the steps]",
    )
    early_stop: Positive | None = Field(
        None, description="stop after so many evaluations in a row without a better validation [default: never]"
    )
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    save_every: Positive | None = Field(
        None, description="steps between checkpoints; a new best on validation is saved too [default: as eval-every]"
    )
    keep: Positive | None = Field(
        None,
        description="newest checkpoints to keep beside the best, after the run too [default: 1, and none after it]",
    )
    sync_every: Positive = Field(
        64, description="steps until the trajectory is surely on the disk: what a power loss can cost"
    )
    worker_timeout: Positive = Field(
        1800, description="under torchrun, seconds that a worker waits for the others, which may be scoring or saving"
    )
    deterministic: bool = Field(False, description="only algorithms that give the same bits each time; slower on CUDA")
    report_to: list[str] = Field(
        [], description="trackers of transformers' Trainer, such as tensorboard, wandb, trackio"
    )

    @field_validator("report_to", "freeze", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return known_name("scheme", value)

    @property
    def rows_a_step(self) -> int:
        return self.batch_size

    @property
    def pairs(self) -> int:
        """Directions of a full step."""
        rows = self.rows_a_step
        return self.directions_a_row * (rows if self.groups == "batch" else min(int(self.groups), rows))

    @property
    def evaluates_every(self) -> int:
        """Steps between evaluations: where updates wait for each other, none falls between two folds."""
        return self.evaluated(0)

    def evaluated(self, rows: int) -> int:
        """The same where validation has so many rows and nothing is said: 500 of them every 6 steps would cost half the time."""
        seen = 2 * self.directions_a_row * self.rows_a_step  # rows of a step's forwards, about
        often = self.eval_every or max(1, self.steps // 10, -(-rows // (seen // 2 or 1)))
        return min(-(-often // self.fold_every) * self.fold_every, self.steps)

    @property
    def saves_every(self) -> int:
        return self.save_every or self.evaluates_every


UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}  # powers


def size_of(text: str) -> int:
    """Bytes; 0 for what is no size above nothing. Without a unit: GiB.

    >>> size_of("6GiB") == 6 * 2**30, size_of("1.5 gb"), size_of("6") == 6 * 2**30, size_of("six")
    (True, 1500000000, True, 0)
    """
    found = re.fullmatch(
        r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt])(i?)b?", text.strip().lower() + "gib" * text.strip()[-1:].isdigit()
    )
    return int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2]]) if found else 0


class Budget(Options):
    max_gpu_memory: str | None = None

    @field_validator("max_gpu_memory", "max_host_memory", mode="before", check_fields=False)
    @classmethod
    def _is_a_size(cls, value: Any) -> Any:
        if value is not None and not size_of(str(value)):
            raise ValueError(f"{value!r} is no size of memory; give one such as 6GiB or 6000MB")
        return None if value is None else str(value)

    @property
    def gpu_bytes(self) -> int:
        """`max_gpu_memory` in bytes."""
        return size_of(str(self.max_gpu_memory))


class TrainConfig(Budget, RunOptions, DataOptions):
    rounding: Literal["nearest", "compensated"] | None = Field(  # type: ignore[assignment]
        None,
        description="of updates of 16-bit weights; compensated keeps what rounding took, in as much memory as what trains "
        "[default: nearest; compensated where nothing of a step is given and the card has room for it]",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        None,  # as it is seen never: see _falls
        validate_default=True,
        description="what becomes of lr over the run [default: constant; with lr auto linear, to 0]",
    )
    calibration_rows: Positive | None = Field(
        None, description="training rows that a mask of wanda is made from [default: 128]"
    )
    loss: str = Field(
        "answer",
        description="answer: −log p of the answer's tokens; candidates: cross-entropy over the label words; or, without a "
        "gradient: accuracy, f1, exact_match, or package.module:function that scores (prompt, answer, golds)",
    )
    accumulate: Positive = Field(1, description="batches an update")
    balance_classes: bool = Field(False, description="as many training rows of each class, drawn by the seed")

    max_gpu_memory: str | None = Field(
        None,
        description="such as 6GiB: what of a CUDA card the run may take; layers stream from host memory, so models may be larger",
    )
    max_host_memory: str | None = Field(
        None,
        description="with --max-gpu-memory: such as 16GiB; of what streams, layers beyond stay in the checkpoint's files, which "
        "are read at each forward: what trains is beside them (--scheme lora, prefix or prompt)",
    )

    _by_default: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def by_default(self) -> dict[str, Any]:
        """Options of its steps that were not given, and come from a table; see `zotune.options.defaults`."""
        return self._by_default

    def note(self, by_default: Mapping[str, Any]) -> None:
        self._by_default = dict(by_default)

    @field_validator("lr_schedule", mode="before")
    @classmethod
    def _falls(cls, value: Any, info: Any) -> Any:
        """A rate that is found is one that falls, where nothing is said."""
        return value or ("linear" if info.data.get("lr") == AUTO else "constant")

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        from zotune.tasks.objectives import check_name

        return check_name(value)

    @property
    def rows_a_step(self) -> int:
        return self.batch_size * self.accumulate


WHOLE = ("full", "head")  # schemes that train weights of the model, which then cannot be quantised


class SweepConfig(TrainConfig):
    output: str = Field(description="folder of the search: a benchmark's, `zotune bench report` reads it")
    lrs: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="learning rates of the grid, such as 1e-6,1e-5 [default: decades around the scheme's]"
    )
    epses: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="eps of the grid [default: the scheme's]"
    )
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="seeds of each pair [default: --seed]")
    trials: Positive | None = Field(
        None, description="search by Optuna with so many runs, between the least and greatest of --lrs and --epses"
    )
    storage: str | None = Field(
        None, description="database URL of the Optuna study [default: SQLite in the output folder]"
    )
    jobs: Positive | None = Field(None, description="runs at one time [default: one for each GPU, else 1]")

    @field_validator("lrs", "epses", "seeds", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return [text.strip() for text in value.split(",") if text.strip()] or None if isinstance(value, str) else value


class CompareConfig(TrainConfig):
    output: str = Field(description="folder of the comparison: a benchmark's, `zotune bench report` reads it")
    equal: Literal["time", "passes", "memory"] = Field(
        "time",
        description="what each way to train gets as much of; memory: the same time, and who fits zeroth order's memory",
    )
    minutes: Annotated[float, Field(gt=0)] = Field(5.0, description="of training each, rates aside")
    passes: Positive | None = Field(
        None, description="forward passes each, for --equal passes [default: --steps times a step's]"
    )
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="seeds of each [default: --seed]")
    jobs: Positive | None = Field(None, description="runs at one time [default: one for each GPU, else 1]")

    @field_validator("seeds", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return [text.strip() for text in value.split(",") if text.strip()] or None if isinstance(value, str) else value


class EvalConfig(DataOptions, ModelOptions):
    adapter: str | None = Field(None, description="folder of a PEFT adapter to put on the model")
    trajectory: str | None = Field(None, description="trajectory.zot of a run: score its chosen step, nothing is saved")
    shots: Annotated[int, Field(ge=0)] = Field(
        0, description="training rows shown with their answers before each prompt, drawn by the seed"
    )
    details: bool = Field(False, description="the 95 % interval too, and which labels are taken for which")
    output: str | None = Field(None, description="write the figures to this JSON file")


class ReplayConfig(ModelOptions):
    trajectory: str = Field(description="trajectory.zot of a run")
    method: str | None = Field(
        None,
        description="the run's own method again, module:NAME, where it is none of zotune's: a file has no code imported",
    )
    output: str = Field(description="folder of the rebuilt model")
    until: str | None = Field(
        None, description="step whose weights to rebuild, or last [default: the step that the run chose]"
    )
    overwrite: bool = Field(False, description="replace the output folder")


class PreviewConfig(DataOptions):
    model: str | None = Field(None, description="hub name or folder of a model: shows its tokens and lengths")
    model_kind: Literal["auto", "causal", "masked", "classifier"] = Field("auto", description="as in `zotune train`")
    gguf_file: str | None = Field(None, description="read the tokenizer from this GGUF file of the model")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    scheme: str = Field("full", description="as in `zotune train`: prefix and prompt take tokens of the model's length")
    shots: Annotated[int, Field(ge=0)] = Field(0, description="as in `zotune eval`: the rows that it scores are shown")
    rows: Positive = Field(5, description="rows to show")


class PredictConfig(DataOptions, ModelOptions):
    adapter: str | None = Field(None, description="folder of a PEFT adapter to put on the model")
    output: str = Field(description="write the rows with labels and scores to this .jsonl, .csv or .tsv file")
    overwrite: bool = Field(False, description="replace the output file")


class MergeConfig(ModelOptions):
    adapter: str = Field(description="folder of the PEFT adapter")
    output: str = Field(description="folder of the merged model")
    overwrite: bool = Field(False, description="replace the output folder")


class EstimateConfig(Budget):
    model: str = Field(description="hub name, folder or config.json of a causal model; no weights are read")
    method: str = Field("zo-sgd", description="a method of the study, ZO or first order (fo-sgd, fo-adam)")
    scheme: str = Field("full", description="full, lora, prefix, prompt or head")
    batch_size: Positive = Field(16, description="rows a step")
    seq_len: Positive | None = Field(None, description="tokens a row [default: 256, or what the model takes]")
    answer_tokens: Positive = Field(1, description="positions a row that need logits")
    members: Positive | None = Field(
        None,
        description="of `zotune reward`: a step whose --batch-size prompts of --seq-len tokens so many members answer",
    )
    max_new_tokens: Positive = Field(64, description="with members: tokens of an answer")
    slots: Positive | None = Field(None, description="with members: answers written at a time [default: by device]")
    workers: Positive | None = Field(
        None, description="a step whose rows so many workers share: what each does, what travels and what all wait for"
    )
    micro_batch: Positive | None = Field(
        None, description="with workers: rows of a piece [default: one piece a worker]"
    )
    groups: Literal["1", "batch"] = Field("1", description="with workers: directions for all rows, or for each its own")
    queries: Positive | None = Field(
        None, description="directions for the same rows [default: the method's own, mostly 1]"
    )
    max_gpu_memory: str | None = Field(
        None,
        description="such as 6GiB: what layers that stream from host memory take of a card, and how long that takes",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights [default: the config's own]"
    )
    state_dtype: Literal["float32", "bfloat16", "parameter"] | None = Field(
        None, description="of the state of momentum and Adam, as in `zotune train` [default: float32]"
    )
    checkpointing: bool = Field(False, description="recompute activations (first order)")
    tf32: bool = Field(False, description="on a card, products of float32 numbers as in `zotune train --tf32`")
    card: str | None = Field(None, description="time on this card instead of here, such as h100, a100, rtx4090, t4")
    memory: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GiB that it has to fit [default: the card's]"
    )
    output: str | None = Field(None, description="write the figures to this JSON file")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the model")
