"""The options of every command: one definition for flags, YAML files and the record of a run. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zotune.errors import InputError, nearest

Positive = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """Unknown keys are refused; strings are read as the numbers they spell."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelOptions(Options):
    model: str = Field(description="hub name or local folder of a pretrained model")
    model_kind: Literal["auto", "causal", "masked", "classifier"] = Field(
        "auto",
        description="causal: the answer follows the prompt; masked: it stands at <mask>; classifier: a head over the labels "
        "[auto: the checkpoint's architecture]",
    )
    gguf_file: str | None = Field(None, description="read the weights from this GGUF file of the model")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights [default: the checkpoint's own]"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to run")


class DataOptions(Options):
    task: str | None = Field(None, description="built-in task, see `zotune list tasks`")
    data_dir: str | None = Field(None, description="folder with TASK/{train,validation,test}.jsonl, instead of the hub")
    data: str | None = Field(
        None,
        description="your own data: a folder of train/validation/test .jsonl or .csv, one such file, or a hub name",
    )
    template: str | None = Field(None, description="prompt over a row's fields, such as '{text} It was'")
    label_field: str | None = Field(None, description="field that holds the label [default: label]")
    label_words: dict[str, str] | None = Field(
        None, description="""JSON, label to word, such as '{"0": "terrible", "1": "great"}'"""
    )
    choices_field: str | None = Field(None, description="field that holds a row's own choices (multiple choice)")
    answer_field: str | None = Field(
        None, description="field that holds the text to generate, or a list of right ones (generation)"
    )
    columns: dict[str, str] | None = Field(
        None, description="""JSON, your data's field to the name that is wanted, such as '{"question": "prompt"}'"""
    )
    alignment: Literal["template", "none"] = Field(
        "template", description="none: the task's prompt without its template's words"
    )
    batch_size: Positive = Field(16, description="rows a step")
    eval_size: Positive | None = Field(
        None, description="at most so many validation and test rows [default: 500, 1000]"
    )
    max_length: Positive | None = Field(None, description="cut the start of longer prompts to so many tokens in all")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the directions, the rows drawn and their order")

    @field_validator("label_words", "columns", mode="before")
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

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        from zotune.tasks import get_task

        if value is not None:
            get_task(value)
        return value


class TrainConfig(DataOptions, ModelOptions):
    output: str = Field(description="folder of the run")
    resume: bool = Field(False, description="go on with the run in the output folder")
    overwrite: bool = Field(False, description="delete the run in the output folder first")
    dry_run: bool = Field(False, description="show what would be done and what it costs; write nothing")
    method: str = Field("zo-sgd", description="see `zotune list methods`")
    scheme: str = Field("full", description="what trains, see `zotune list schemes`")
    direction: Literal["gaussian", "rademacher"] = Field("gaussian", description="distribution of the directions")
    estimator: Literal["two-sided", "one-sided"] = Field("two-sided", description="how the losses give a gradient")
    lr: Annotated[float, Field(ge=0)] | None = Field(
        None, description="learning rate [default: by scheme and model size]"
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="perturbation of the weights [default: by scheme]"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="what becomes of lr over the run"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    queries: Positive = Field(1, description="directions a step; each costs two forwards")
    groups: Positive | Literal["batch"] = Field(
        1, description="directions over the rows of a batch: 1, a number, or batch for one a row (engine lowrank)"
    )
    rank: Positive = Field(1, description="rank of the directions of engine lowrank")
    sign_mode: Literal["element", "scalar"] | None = Field(
        None, description="of zo-sgd-sign: sign of each element of the estimate, or of g alone [default: element]"
    )
    beta: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="of zo-sgd-mmt [default: 0.9]")
    state_dtype: Literal["float32", "parameter"] | None = Field(
        None, description="of the state of momentum and Adam [default: float32]"
    )
    g_clip: Annotated[float, Field(gt=0)] | None = Field(None, description="bound on |g| of each direction")
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="fraction of the weights that a step leaves out"
    )
    mask: Literal["random", "magnitude"] | None = Field(
        None, description="which weights sparsity leaves out: random ones or the smallest [default: random]"
    )
    sparsity_scope: Literal["layer", "global"] | None = Field(
        None, description="fraction of each tensor, or of all weights together [default: layer]"
    )
    mask_refresh: Positive | None = Field(None, description="steps until a new mask [default: never]")
    blocks: Literal["transformer", "attention-mlp", "linear"] | None = Field(
        None, description="descend block by block, all of them each step; each costs two forwards"
    )
    block_update: Literal["gauss-seidel", "jacobi"] | None = Field(
        None, description="move each block before the next is probed, or all at the end [default: gauss-seidel]"
    )
    hybrid: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="fraction of the layers, from the input on, that train by the method; the others by back-propagation",
    )
    fo_lr: Annotated[float, Field(ge=0)] | None = Field(None, description="learning rate of the others, with hybrid")
    loss: str = Field(
        "answer",
        description="answer: −log p of the answer's tokens; candidates: cross-entropy over the label words; or, without a "
        "gradient: accuracy, f1, exact_match, or package.module:function that scores (prompt, answer, golds)",
    )
    engine: str = Field("auto", description="see `zotune list engines`")
    steps: Positive = Field(1000, description="updates")
    accumulate: Positive = Field(1, description="batches an update")
    train_size: Positive = Field(1000, description="at most so many training rows")
    eval_every: Positive | None = Field(None, description="steps between evaluations on validation [default: a tenth]")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    report_to: list[str] = Field(
        [], description="trackers of transformers' Trainer, such as tensorboard, wandb, trackio"
    )

    @field_validator("groups", mode="before")
    @classmethod
    def _groups(cls, value: Any) -> Any:
        if value == "batch" or (str(value).isdecimal() and int(value) >= 1):
            return value if value == "batch" else int(value)
        raise ValueError(f"{value!r}: give 1, a number of directions, or batch")

    @field_validator("report_to", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        from zotune.tasks.objectives import check_name

        return check_name(value)

    @field_validator("method", "engine", "scheme")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        from zotune.registry import names

        known = names(info.field_name)
        if value not in known:
            raise ValueError(f"unknown {info.field_name} {value!r}; {nearest(value, known)}")
        return value

    @property
    def step_options(self) -> dict[str, Any]:
        """What the method and the enhancements of it are given, beyond what every method takes."""
        given = {k: v for k in STEP_OPTIONS if (v := getattr(self, k)) is not None}
        from zotune.methods import METHODS

        if self.estimator != "two-sided" or "estimator" in METHODS[self.method].options:
            given["estimator"] = self.estimator
        return given

    @property
    def pairs(self) -> int:
        """Directions of a full step."""
        rows = self.batch_size * self.accumulate
        return self.queries * (rows if self.groups == "batch" else min(int(self.groups), rows))

    @property
    def evaluates_every(self) -> int:
        return min(self.eval_every or max(1, self.steps // 10), self.steps)


# Options that go to `ZeroOrderOptimizer` as they are, where they are given.
STEP_OPTIONS = (
    "sign_mode", "beta", "state_dtype", "g_clip", "sparsity", "mask", "sparsity_scope", "mask_refresh", "blocks",
    "block_update", "hybrid", "fo_lr",
)  # fmt: skip


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


class EvalConfig(DataOptions, ModelOptions):
    adapter: str | None = Field(None, description="folder of a PEFT adapter to put on the model")
    trajectory: str | None = Field(None, description="trajectory.zot of a run: score its chosen step, nothing is saved")
    shots: Annotated[int, Field(ge=0)] = Field(
        0, description="training rows shown with their answers before each prompt, drawn by the seed"
    )
    output: str | None = Field(None, description="write the figures to this JSON file")


class ReplayConfig(ModelOptions):
    trajectory: str = Field(description="trajectory.zot of a run")
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
    rows: Positive = Field(5, description="rows to show")


class PredictConfig(DataOptions, ModelOptions):
    adapter: str | None = Field(None, description="folder of a PEFT adapter to put on the model")
    output: str = Field(description="write labels and scores to this .jsonl file")
    overwrite: bool = Field(False, description="replace the output file")


class MergeConfig(ModelOptions):
    adapter: str = Field(description="folder of the PEFT adapter")
    output: str = Field(description="folder of the merged model")
    overwrite: bool = Field(False, description="replace the output folder")


class EstimateConfig(Options):
    model: str = Field(description="hub name, folder or config.json of a causal model; no weights are read")
    method: str = Field("zo-sgd", description="a method of the study, ZO or first order (fo-sgd, fo-adam)")
    scheme: str = Field("full", description="full, lora, prefix, prompt or head")
    batch_size: Positive = Field(16, description="rows a step")
    seq_len: Positive = Field(256, description="tokens a row")
    answer_tokens: Positive = Field(1, description="positions a row that need logits")
    queries: Positive = Field(1, description="directions a step")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights [default: the config's own]"
    )
    checkpointing: bool = Field(False, description="recompute activations (first order)")
    card: str | None = Field(None, description="time on this card instead of here, such as h100, a100, rtx4090, t4")
    memory: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GiB that it has to fit [default: the card's]"
    )
    output: str | None = Field(None, description="write the figures to this JSON file")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the model")


T = TypeVar("T", bound=Options)


def resolve(kind: type[T], flags: Mapping[str, Any], file: str | None) -> T:
    """The options of a command: the YAML file's, over them the flags. All errors are raised as one InputError, a line each."""
    from_file = _read_yaml(file) if file else {}
    problems = [
        f"{file}: unknown key {key!r}; {nearest(key, kind.model_fields)}"
        for key in from_file
        if key not in kind.model_fields and not _of_another_command(key, kind)
    ]
    given = {key: value for key, value in from_file.items() if key in kind.model_fields}
    given |= {key: value for key, value in flags.items() if value is not None}
    try:
        options = kind.model_validate(given)
    except ValidationError as error:
        flagged = {key for key, value in flags.items() if value is not None}
        problems += [_line(e, None if e["loc"][0] in flagged else file) for e in error.errors()]
    else:
        if isinstance(options, TrainConfig):
            problems += _method_problems(options)
    if issubclass(kind, DataOptions):
        problems += _data_problems(given)
    problems += _engine_problems(given)
    if given.get("adapter") is not None and given.get("trajectory") is not None:
        problems.append("--adapter, --trajectory: give one of the two")
    if given.get("resume") in (True, "true") and given.get("overwrite") in (True, "true"):
        problems.append("--resume and --overwrite: choose one")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return options


def _data_problems(given: Mapping[str, Any]) -> list[str]:
    """What pydantic cannot see: options that exclude or need each other."""
    problems = []
    task, data = given.get("task"), given.get("data")
    if (task is None) == (data is None):
        problems.append("--task, --data: give one of the two" + (", not both" if task else ""))
    if (
        data is not None
        and given.get("template") is None
        and not any(
            given.get(key) is not None for key in ("label_words", "choices_field", "answer_field", "label_field")
        )
    ):
        return problems  # prompt and completion, as the rows will show
    if data is not None:
        if not given.get("template"):
            problems.append(
                "--template: needed with --data, such as '{text} It was' (rows of prompt and completion need no option)"
            )
        kinds = ("label_words", "choices_field", "answer_field")
        if sum(given.get(key) is not None for key in kinds) != 1:
            problems.append("--label-words, --choices-field, --answer-field: give one of them with --data")
        if given.get("answer_field") is not None and given.get("loss") == "candidates":
            problems.append("--loss candidates: a generated answer has none; use answer")
    elif task is not None:
        owned = ("template", "label_field", "label_words", "choices_field", "answer_field")
        problems += [
            f"{_flag(key)}: belongs to --data; --task brings its own" for key in owned if given.get(key) is not None
        ]
    return problems


def _method_problems(options: TrainConfig) -> list[str]:
    """Options that the method does not have, or that do not go together."""
    from zotune.methods import make_method

    given = options.step_options
    own = {k: v for k, v in given.items() if k in ("estimator", "sign_mode", "beta", "state_dtype")}
    try:
        method = make_method(options.method, queries=options.queries, **own)
        if len(given) > len(own):
            from zotune.enhancements import Enhancements

            enhancements = Enhancements(**{k: v for k, v in given.items() if k not in own})
            enhancements.refuse(options.method, method.first_order, method.rule.extra_forwards > 0)
        if method.rule.extra_forwards and options.weight_decay:
            raise ValueError(f"method {options.method!r} takes no weight_decay: it may stay where it is")
    except ValueError as error:
        name = next((k for k in (*STEP_OPTIONS, "estimator", "queries") if k in str(error)), "method")
        return [f"{_flag(name)}: {error}"]
    return []


def _engine_problems(given: Mapping[str, Any]) -> list[str]:
    groups, engine = str(given.get("groups", 1)), given.get("engine", "auto")
    problems = []
    if groups != "1" and engine in ("sequential", "dual"):
        problems.append(f"--groups {groups}: engine {engine} gives a batch one direction; use --engine lowrank or auto")
    if groups != "1" and given.get("estimator") == "one-sided":
        problems.append(f"--groups {groups}: needs two-sided estimates")
    return problems


def _of_another_command(key: str, kind: type[Options]) -> bool:
    """A run's config.yaml also serves `eval` and `predict`: what only training has is passed over there."""
    return kind is not TrainConfig and key in TrainConfig.model_fields


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    path = Path(file).expanduser()
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {file}: not UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{file}{where}: not YAML ({getattr(error, 'problem', None) or 'nested too deeply'})"
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{file}: a {type(value).__name__} where keys and values were expected")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def _line(error: Any, file: str | None) -> str:
    name = str(error["loc"][0])
    where = f"{file}: {name}" if file else _flag(name)
    if error["type"] == "missing":
        return f"{_flag(name)}: required"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] in ("value_error", "assertion_error"):
        return f"{where}: {said}"
    if error["type"] == "literal_error":
        choices = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: unknown {name.replace('_', ' ')} {error['input']!r}; {nearest(str(error['input']), choices)}"
    return f"{where}: {error['input']!r} should be {said}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
