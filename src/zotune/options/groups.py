"""Under which heading each option of a command stands, in its help and in the reference."""

from __future__ import annotations

from zotune.files.checked import Options
from zotune.options.commands import CompareConfig, DataOptions, ModelOptions, OutputOptions, RowOptions
from zotune.options.reward import RewardConfig
from zotune.options.step import METHOD_OPTIONS, StepOptions

OTHERS, OF_A_RUN = "Options", "Training"
# Of the model that an option was first a field of; a run's others stand under "Training".
HEADINGS: dict[type[Options], str] = {
    ModelOptions: "Model and device",
    RowOptions: "Rows",
    DataOptions: "Rows",
    OutputOptions: "The run's folder",
    StepOptions: "The step",
    RewardConfig: "Answers and rewards",
    CompareConfig: "The comparison",
}
APART: dict[str, tuple[str, ...]] = {  # of those some that are looked for together
    OF_A_RUN: ("batch_size", "seed"),
    "Of single methods": METHOD_OPTIONS,
    "What a step leaves out": (
        "sparsity", "mask", "sparsity_scope", "mask_refresh", "calibration_rows", "freeze", "blocks", "block_update",
        "hybrid", "fo_lr",
    ),
    "Speed, memory and rounding": (
        "engine", "rank", "forward_tokens", "fold_every", "rounding", "tf32", "deterministic", "dtype", "device",
        "quantize", "max_gpu_memory", "max_host_memory",
    ),
    "Evaluation, logs and checkpoints": (
        "eval_size", "eval_every", "early_stop", "log_every", "save_every", "keep", "sync_every", "report_to",
    ),
}  # fmt: skip


def heading(command: type[Options], option: str) -> str:
    """Of an option of a command: a new one stands with its neighbours until somebody says otherwise here."""
    run = issubclass(command, StepOptions)
    if run:
        for title, names in APART.items():
            if option in names:
                return title
    home = next(kind for kind in reversed(command.__mro__) if option in vars(kind).get("__annotations__", {}))
    return HEADINGS.get(home, OF_A_RUN if run else OTHERS)


def grouped(command: type[Options]) -> dict[str, list[str]]:
    """heading → options, both in the order in which the help shows them: what every run needs first."""
    found: dict[str, list[str]] = {title: [] for title in (OTHERS, *HEADINGS.values(), *APART)}
    for option in command.model_fields:
        found[heading(command, option)].append(option)
    return {title: options for title, options in found.items() if options}
