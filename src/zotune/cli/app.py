"""The commands put together, and how their errors are said: a line each, no traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

import zotune
from zotune import options as config
from zotune import quiet
from zotune.cli import bench, tasks
from zotune.errors import Elsewhere, InputError, NonFiniteLoss, WorkerError, plain
from zotune.options.groups import grouped
from zotune.rewards import RewardError
from zotune.workers import launcher

# Typer may bring its own copy of click: its errors are found through typer's.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="zotune",
    help="Fine-tune language models without back-propagation, in the memory of inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"zotune {zotune.__version__}")
        raise typer.Exit


SHARED = ("train", "reward", "bench")  # commands that the processes of a launcher take together; of bench, run


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="the version; `zotune env` has the libraries' too", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    launcher.refuse_shared(context.invoked_subcommand, SHARED)


COMMANDS: dict[str, type[config.Options]] = {}  # those whose flags are a model of options


def command(
    name: str, kind: type[config.Options], summary: str, run: Callable[[Any], None], example: str | None = None
) -> None:
    """A command whose flags are the fields of `kind`. Values go to pydantic as text, so that all faults are told at once."""
    COMMANDS[name] = kind
    parameters = []
    for panel, key in ((panel, key) for panel, keys in grouped(kind).items() for key in keys):
        field = kind.model_fields[key]
        flag = "--" + key.replace("_", "-")
        help_text = field.description or ""
        if field.is_required():
            help_text += " [required]"
        elif field.default not in (None, False, []):
            help_text += f" [default: {field.default}]"
        told: dict[str, Any] = {"help": escape(help_text), "show_default": False, "rich_help_panel": panel}
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("repeat"):
            option = typer.Option(flag, metavar="TEXT", **told)
            annotation: Any = Annotated[Optional[list[str]], option]  # noqa: UP045
        elif field.annotation is bool:
            option = typer.Option(flag, metavar="", **told)
            annotation = Annotated[Optional[bool], option]  # noqa: UP045
        else:
            option = typer.Option(flag, metavar=metavar(field.annotation), **told)
            annotation = Annotated[Optional[str], option]  # noqa: UP045
        parameters.append(Parameter(key, Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    file = Annotated[str | None, typer.Option("--config", help="YAML file of the same keys; flags win", metavar="FILE")]
    parameters.append(Parameter("config_file", Parameter.KEYWORD_ONLY, default=None, annotation=file))

    def body(**flags: Any) -> None:
        flags = {key: None if value == [] else value for key, value in flags.items()}
        run(config.resolve(kind, flags, flags.pop("config_file")))

    body.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=summary, epilog=f"Example:\n\n{escape(example)}" if example else None)(body)


def metavar(annotation: Any) -> str:
    """How an option's value is written, in its help and in the reference."""
    text = str(annotation)
    if "Literal" in text:
        names = "|".join(part.split("'")[0] for part in text.split("'")[1::2]) or "1"
        return f"F|{names}" if "float" in text and "float32" not in text else names
    if text.startswith("str"):
        return "TEXT"
    for word, metavar in (("dict", "JSON"), ("list", "NAMES"), ("int", "N"), ("float", "F")):
        if word in text:
            return metavar
    return "TEXT"


def _quiet() -> None:
    """What transformers prints while it loads and saves says nothing that a user of this command needs."""
    quiet.libraries()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _train(options: config.TrainConfig) -> None:
    _quiet()
    from zotune.cli.train import train

    train(options)


def _reward(options: config.RewardConfig) -> None:
    _quiet()
    from zotune.cli.reward import reward

    reward(options)


def _eval(options: config.EvalConfig) -> None:
    _quiet()
    from zotune.cli.evaluate import evaluate

    evaluate(options)


def _predict(options: config.PredictConfig) -> None:
    _quiet()
    from zotune.cli.evaluate import predict

    predict(options)


def _merge(options: config.MergeConfig) -> None:
    _quiet()
    from zotune.cli.merge import merge

    merge(options)


def _preview(options: config.PreviewConfig) -> None:
    _quiet()
    from zotune.cli.preview import preview

    preview(options)


def _replay(options: config.ReplayConfig) -> None:
    _quiet()
    from zotune.cli.replay import replay

    replay(options)


def _estimate(options: config.EstimateConfig) -> None:
    _quiet()
    from zotune.cli.estimate import estimate

    estimate(options)


def _sweep(options: config.SweepConfig) -> None:
    quiet.libraries()
    from zotune.cli.sweep import sweep

    sweep(options)


def _compare(options: config.CompareConfig) -> None:
    _quiet()
    from zotune.cli.compare import compare

    compare(options)


EXAMPLE = (
    "zotune train --model HuggingFaceTB/SmolLM2-135M-Instruct --data reviews/ --template '{text} It was' "
    """--label-words '{"0": "terrible", "1": "great"}' --loss candidates --output runs/reviews --dry-run"""
)
command("train", config.TrainConfig, "Fine-tune a model; the run goes into a folder.", _train, EXAMPLE)
command("reward", config.RewardConfig, "Raise a reward on what a model writes; the run goes into a folder.", _reward)
command("eval", config.EvalConfig, "Score a model on a task's test split, or on your own data.", _eval)
command("predict", config.PredictConfig, "Label rows: the best label and the score of each.", _predict)
command("preview", config.PreviewConfig, "Rows as the model will see them.", _preview)
command("replay", config.ReplayConfig, "Rebuild a run's weights from its base model and trajectory.", _replay)
command("merge", config.MergeConfig, "Merge an adapter into its model.", _merge)

command(
    "estimate", config.EstimateConfig, "Memory and time of a configuration, from the model's config alone.", _estimate
)
command("sweep", config.SweepConfig, "Search lr and eps, by grid or Optuna; the choice is made on validation.", _sweep)
command(
    "compare", config.CompareConfig, "Zeroth order beside back-propagation on your rows, and what to use.", _compare
)
app.add_typer(bench.app)
app.add_typer(tasks.app, name="tasks")


@app.command("list", help="What there is to choose from: methods, schemes, tasks or engines.")
def _list(kind: Annotated[str | None, typer.Argument(metavar="methods|schemes|tasks|engines")] = None) -> None:
    from zotune.cli.about import show, show_kinds

    show_kinds() if kind is None else show(kind)


@app.command("report", help="What finished runs came to, as a page: figures with intervals, curves, rows that changed.")
def _report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="folders of finished runs")],
    output: Annotated[str | None, typer.Option("--output", help="the page [default: report.html in the first]")] = None,
) -> None:
    from zotune.cli.report import report

    report(runs, output)


@app.command("env", help="What a bug report needs: versions, devices, threads.")
def _env() -> None:
    from zotune.cli.about import environment

    environment()


@functools.cache
def _commands() -> Any:
    """Made once: typer reads the signatures of all commands, and a process may run many."""
    return typer.main.get_command(app)


def run(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    asked = sys.argv[1:] if argv is None else argv
    try:
        # without arguments the help is an error's message, which belongs on stderr
        with contextlib.nullcontext() if asked else contextlib.redirect_stdout(sys.stderr):
            code = _commands()(args=asked, standalone_mode=False)
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked for: its message is the help
            print(error.format_message(), file=sys.stderr)
            return 2
        return _fail(str(error.format_message()), getattr(error, "ctx", None))
    except (typer.Exit, SystemExit) as error:
        return int(getattr(error, "exit_code", getattr(error, "code", 0)) or 0)
    except (typer.Abort, KeyboardInterrupt):
        print("zotune: interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Elsewhere as error:
        return _silently(error.code)
    except (NonFiniteLoss, RewardError, WorkerError, OSError) as error:
        print(f"zotune: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (code := getattr(error, "code", None)) in (130, 143):
            print(f"zotune: {error}", file=sys.stderr)
            return int(code)
        raise
    return code if isinstance(code, int) else 0  # Ctrl-C comes back as a number


def _silently(code: int) -> int:
    """Not before the worker that says why has said it: torchrun ends all others when one has ended."""
    time.sleep(1)
    return code


def _fail(message: str, context: Any = None) -> int:
    """What is wrong, a line each. What all workers of one machine see as they begin is said by one of them."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not message.startswith("worker "):
        return _silently(2)
    for line in message.splitlines():
        print(f"zotune: {plain(line)}", file=sys.stderr)
    if context is not None and context.command is not None:
        print(f"zotune: see {context.command_path} --help", file=sys.stderr)
    return 2
