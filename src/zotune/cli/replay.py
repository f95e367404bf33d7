"""`zotune replay`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from zotune.cli.progress import Bars
from zotune.errors import InputError
from zotune.models import adapters
from zotune.models.finite import refuse_weights
from zotune.options import ModelOptions, ReplayConfig
from zotune.prepare.model import load
from zotune.record import replay as replays
from zotune.run.card import rebuilt_card
from zotune.run.folder import CARD, check_model_folder, model_folder
from zotune.tasks import ends


def replay(options: ReplayConfig) -> None:
    """The weights of a run's step, from its base model and its trajectory, as a model folder."""
    output = Path(options.output).expanduser()
    check_model_folder(output, options.overwrite)
    model, tokenizer, line = rebuilt(options, options.trajectory, options.until, method=options.method)
    refuse_weights(model, f"--trajectory {options.trajectory}")
    with model_folder(output) as path:
        adapters.save(model, tokenizer, path)
        ends.save_beside_adapter(model, path)
        rebuilt_card(replays.open_trajectory(options.trajectory, "0")[0].header, line).save(path / CARD)
    print(f"{line}\n{output}")


def rebuilt(
    options: ModelOptions,
    trajectory: str,
    until: str | None = None,
    bars: Bars | None = None,
    method: str | None = None,
) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what was rebuilt in a line. A dtype that is named is taken after the steps, not before."""
    found, steps = replays.open_trajectory(trajectory, until)  # before a model is loaded
    header = found.header
    replays.check(header, trajectory, method)
    quantize = header.base.get("quantize")
    if options.quantize not in (None, quantize):
        raise InputError(
            f"--quantize {options.quantize}: the run's base was {quantize or 'not quantised'}; leave the option out"
        )
    if quantize and options.dtype not in (None, header.dtype):
        raise InputError(f"--dtype {options.dtype}: a quantised base keeps the run's dtype, {header.dtype}")
    kind, labels = header.base.get("kind") or "causal", header.base.get("labels") or []
    kept: dict[str, Any] = {}

    def base(dtype: str | None) -> Any:
        model, kept["tokenizer"] = load(
            options.model_copy(update={"dtype": dtype, "model_kind": kind, "quantize": quantize}),
            labels=labels,
            seed=header.seed,
        )
        return model

    with nullcontext(bars) if bars is not None else Bars() as bars:
        bars.begin("replay", steps)
        model, found, steps, differ = replays.rebuild(
            base, trajectory, until, lambda done: bars.advance("replay", done), method
        )
    ends.take_from_record(model, found.header.extra)
    if found.torn_bytes:
        print(f"{trajectory}: its last record is torn ({found.torn_bytes} bytes) and left out")
    if options.dtype and options.dtype != found.header.dtype:
        from zotune.models.loading import DTYPES

        model = model.to(DTYPES[options.dtype])
        differ = [*differ, f"dtype was {found.header.dtype}, is {options.dtype}"]
    return model.eval(), kept["tokenizer"], replays.described(found, steps, differ)
