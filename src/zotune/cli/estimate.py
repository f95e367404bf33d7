"""`zotune estimate`: memory and time of a configuration, before anything is downloaded or loaded."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from typing import Any

from zotune.errors import InputError, nearest
from zotune.estimates.memory import readable
from zotune.options import EstimateConfig
from zotune.run.folder import write_atomically

SEQ_LEN = 256
BYTES, FORMATS = {"GiB": 2**30, "MiB": 2**20}, {"GiB": ".2f", "MiB": ".1f"}


def estimate(options: EstimateConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from zotune.estimates.estimate import compare
    from zotune.estimates.meta import model_config
    from zotune.estimates.needs import needs_of
    from zotune.estimates.rates import CARDS, rates_here
    from zotune.inference import output_file
    from zotune.methods import METHODS

    if options.card is not None and options.card not in CARDS:
        raise InputError(f"--card {options.card}: {nearest(options.card, CARDS)}")
    needs = needs_of(options.method)
    if (options.queries or 1) > 1 and "queries" not in needs.options:
        raise InputError(f"--queries {options.queries}: method {options.method!r} draws no directions")
    path = output_file(options.output) if options.output else None
    config = model_config(options.model, options.trust_remote_code)
    rates = CARDS[options.card] if options.card else rates_here()
    room = int(options.memory * 2**30) if options.memory else rates.memory
    limit = getattr(config, "max_position_embeddings", None)
    seq_len = options.seq_len or min(SEQ_LEN, limit if isinstance(limit, int) else SEQ_LEN)
    if options.members:
        _rewards(options, config, rates, room, seq_len, path)
        return
    if options.workers:
        _workers(options, config, rates, room, seq_len, path)
        return
    if options.micro_batch or options.groups != "1":
        raise InputError("--micro-batch, --groups: of a step that several share; say how many by --workers")
    _crossing(options, config)
    chosen: dict[str, Any] = {"method": options.method, "scheme": options.scheme}
    if options.checkpointing and needs.kind != "first-order":
        able = " and ".join(name for name in METHODS if needs_of(name).kind == "first-order")
        raise InputError(f"--checkpointing: method {options.method!r} keeps no activations; it is for {able}")
    if options.state_dtype:
        if "state_dtype" not in needs.options:
            raise InputError(f"--state-dtype: method {options.method!r} keeps no state")
        chosen["state_dtype"] = options.state_dtype
    if options.checkpointing:
        chosen["checkpointing"] = True
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        left_out: list[str] = []
        rows = compare(
            config, chosen, left_out=left_out, batch_size=options.batch_size, seq_len=seq_len, dtype=options.dtype,
            queries=options.queries, answer_tokens=options.answer_tokens, rates=rates, tf32=options.tf32,
        )  # fmt: skip
    first = rows[0]
    console = Console()
    console.print(
        f"{options.model}: {first.method}, {first.scheme}, {options.batch_size} × {seq_len} tokens",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 1, 0, 0))
    unit = "GiB" if min(row.peak for row in rows) >= 0.1 * 2**30 else "MiB"
    table.add_column(unit, no_wrap=True)
    for name in ("weights", "grads", "state", "activ.", "peak", "ms/step", "fits" if room else ""):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        sizes = [row.weights, row.gradients, row.state, row.activations, row.peak]
        figures = [f"{size / BYTES[unit]:{FORMATS[unit]}}" for size in sizes]
        fits = "" if not room else "yes" if row.peak <= room else "no"
        name = f"{row.method} {row.scheme} {row.variant}".strip()
        table.add_row(name, *figures, f"{1000 * (row.step_seconds or 0):.0f}", fits, style="bold" if i == 0 else "")
    console.print(table, highlight=False)
    for line in left_out:
        console.print(f"not here: {line}", highlight=False, markup=False, soft_wrap=True)
    where = options.card or "this machine"
    console.print(
        f"memory: within a tenth of measured peaks; time: rough, on {where}; logits at {options.answer_tokens} "
        f"position{'s' if options.answer_tokens > 1 else ''} a row" + (f"; {readable(room)} to fit" if room else ""),
        highlight=False,
    )
    console.print("fo-adam below the first row: its moments in the weights' dtype, as torch's are", highlight=False)
    if path is not None:
        write_atomically(path, json.dumps([vars(row) for row in rows], indent=2, allow_nan=False) + "\n")


def _crossing(options: EstimateConfig, config: Any) -> float:
    """Seconds in which layers that stream pass over the bus for one forward of all places, which is said; 0 where none stream."""
    if options.max_gpu_memory is None:
        return 0.0
    from zotune.engines.streamed import plan_of
    from zotune.estimates.meta import build, with_scheme
    from zotune.estimates.streaming import bus_seconds, said
    from zotune.models.loading import DTYPES

    kind = DTYPES[options.dtype] if options.dtype else (getattr(config, "dtype", None) or DTYPES["float32"])
    model, _ = with_scheme(build(copy.deepcopy(config), kind), options.scheme)
    plan = plan_of(model)
    writes = any(param.requires_grad for _, _, params in plan.blocks for param in params)
    print(f"--max-gpu-memory {options.max_gpu_memory}: {said(plan, options.gpu_bytes, writes)}")
    return bus_seconds(plan, writes)


def _rewards(options: EstimateConfig, config: Any, rates: Any, room: int | None, seq_len: int, path: Any) -> None:
    """Of a step of `zotune reward`."""
    from rich.console import Console
    from rich.table import Table

    from zotune.cli.expected import time_of
    from zotune.decode.slots import SLOTS_ON_CPU, SLOTS_ON_CUDA
    from zotune.estimates.writing import writing_cost

    assert options.members is not None
    slots = options.slots or (SLOTS_ON_CPU if rates.node is None else SLOTS_ON_CUDA)
    dtype = options.dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = writing_cost(
            config, members=options.members, prompts=options.batch_size, seq_len=seq_len, new_tokens=options.max_new_tokens,
            slots=slots, scheme=options.scheme, dtype=dtype, rates=rates,
        )  # fmt: skip
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "answers a step", f"{made.answers:,}, {made.slots} at a time, of at most {options.max_new_tokens} tokens"
    )
    table.add_row("weights", readable(made.weights))
    table.add_row("keys and values", readable(made.cache))
    fits = "" if not room else f"   {'fits' if made.peak <= room else 'does not fit'} in {readable(room)}"
    table.add_row("peak", f"{readable(made.peak)}{fits}")
    where = options.card or "this machine"
    table.add_row("a step", f"{time_of(made.step_seconds)} at most, rough, on {where}; without the reward functions")
    console.print(table, highlight=False)
    if path is not None:
        write_atomically(path, json.dumps(vars(made), indent=2, allow_nan=False) + "\n")


def _workers(options: EstimateConfig, config: Any, rates: Any, room: int | None, seq_len: int, path: Any) -> None:
    """Of a step of `zotune train` under torchrun."""
    from rich.console import Console
    from rich.table import Table

    from zotune.cli.expected import time_of
    from zotune.estimates.fleet import Fleet, shared

    assert options.workers is not None
    fleet = Fleet()
    dtype = options.dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    by_row = options.groups == "batch"
    crossing = _crossing(options, config)
    room = None if crossing else room  # a card holds what it is told to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = shared(
            config, workers=options.workers, micro_batch=options.micro_batch, method=options.method, queries=options.queries,
            batch_size=options.batch_size, by_row=by_row, rates=rates, fleet=fleet, room=room, dtype=dtype, scheme=options.scheme,
            seq_len=seq_len, answer_tokens=options.answer_tokens, tf32=options.tf32, engine="lowrank" if by_row else "auto",
            crossing=crossing,
        )  # fmt: skip
    piece = options.micro_batch or -(-options.batch_size // options.workers)
    console, table = Console(), Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("a worker", f"{made.pieces} of the {-(-options.batch_size // piece)} pieces of {piece} rows a step")
    table.add_row(
        "its memory",
        f"{readable(options.gpu_bytes)} of a card"
        if crossing
        else readable(made.peak) + (f", {made.cards} cards" if made.cards > 1 else ""),
    )
    table.add_row("sends", f"{made.message:,} bytes a step; gradients would be {readable(made.gradients)}")
    table.add_row("computes", _short(made.compute) + (", evenly over its cards" if made.cards > 1 else ""))
    table.add_row(
        "waits", f"{_short(made.waiting)} for the slowest of {made.workers}, {_short(made.exchange)} for messages"
    )
    table.add_row("a step", f"{_short(made.seconds)}, {made.speed:.1f} times the speed of one worker")
    table.add_row("failures", f"{100 * made.lost:.2g} % of the time")
    if made.cards > 1:
        table.add_row("or by the bus", f"{time_of(made.bus)} a forward, one card that its weights pass through")
    console.print(table, highlight=False)
    where = options.card or "this machine"
    console.print(
        f"rough, on {where}; messages over {8 * fleet.bandwidth / 1e9:g} Gbit/s with {1e3 * fleet.latency:g} ms a hop, times of "
        f"workers apart by {100 * fleet.spread:.0f} %, a failure in {fleet.hours:.0f} hours of each, {fleet.restart:.0f} s to go "
        f"on and {fleet.repair:.0f} s until it is back",
        highlight=False,
        soft_wrap=True,
    )
    if crossing:
        print("layers stream in one process so far: `zotune train` refuses --max-gpu-memory of several workers")
    if path is not None:
        write_atomically(path, json.dumps(vars(made) | {"speed": made.speed}, indent=2, allow_nan=False) + "\n")


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
