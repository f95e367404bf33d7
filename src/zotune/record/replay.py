"""A run's weights again, from its base model and its trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import transformers
from torch import nn

from zotune import noise
from zotune.directions.calibration import NormsFolder
from zotune.errors import InputError, plain
from zotune.methods import METHODS, make_method, plugins
from zotune.models import schemes
from zotune.models.loading import DTYPES
from zotune.models.quantized import is_quantized, library_versions
from zotune.record.fingerprints import fingerprint, machine, start
from zotune.record.trajectory import Header, Record, Trajectory, read_file
from zotune.run.folder import CALIBRATION
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.trainer import parameter_groups

AT_ONCE = 1024  # steps in one pass over the weights


def open_trajectory(path: str, until: str | None) -> tuple[Trajectory, int]:
    """The records, and how many steps of them are wanted. until: a number, "last", or None for the run's chosen step."""
    if until is not None and until != "last":
        if not until.isdecimal():
            raise InputError(f"--until {until}: give a step, or last")
        return read_file(path, until=int(until)), int(until)
    whole = read_file(path)
    if until == "last":
        return whole, len(whole.records)
    if whole.chosen_step is None:
        raise InputError(
            f"{path}: the run has not ended ({len(whole.records)} of {whole.header.planned_steps} steps are here"
            f"{', and a torn one' if whole.torn_bytes else ''}), so it names no step as its result; give --until last, or a step"
        )
    return whole, whole.chosen_step


def check(header: Header, path: str, method: str | None = None) -> None:
    """Refuse what this version cannot apply, and a header whose parts are of the wrong kind: it may be a stranger's.

    method: what the user named again. A method that is none of zotune's is code, and a file has no code imported.
    """
    if header.noise_version != noise.NOISE_VERSION:
        raise InputError(
            f"{path}: its directions are of noise definition {header.noise_version}, this version draws "
            f"{noise.NOISE_VERSION}; use the zotune that wrote it ({header.versions.get('zotune', 'unknown')!s:.40})"
        )
    if method not in (None, header.method):
        raise InputError(f"--method {method}: the run's was {plain(header.method):.80}")
    if (":" in header.method or header.method in plugins()) and header.method not in METHODS and method is None:
        raise InputError(
            f"{path}: its method is none of zotune's; where you know that module, name it again, to `zotune replay`: "
            f"--method {plain(header.method):.80}"
        )
    if header.method not in METHODS and method is None:
        raise InputError(f"{path}: method {header.method!r:.80} is not known here; update zotune")
    base, queries = header.base, header.method_options.get("queries", 1)
    texts = [header.dtype, *(base.get(key) or "" for key in ("name", "scheme", "kind", "sha256", "start"))]
    labels, frozen, written = base.get("labels") or [], base.get("freeze") or [], base.get("machine") or {}
    sound = (
        all(isinstance(text, str) for text in texts)
        and isinstance(labels, list)
        and isinstance(frozen, list)
        and all(isinstance(text, str) for text in [*labels, *frozen])
        and isinstance(written, dict)
        and header.dtype in ("", *DTYPES)
        and type(queries) is int
        and 1 <= queries <= header.pairs
        and header.pairs % queries == 0
    )
    named = method or header.method
    if named in METHODS and make_method(named).needs_rows:
        raise InputError(
            f"{path}: a step of {named} is a function of the run's rows too, so its record alone cannot be applied again; "
            "use the run's folder model/"
        )
    if not sound:
        raise InputError(
            f"{path}: its header is not one that zotune writes (base, dtype or queries); fetch the file again"
        )


def rebuild(
    load: Callable[[str | None], nn.Module],
    path: str,
    until: str | None = None,
    advance: Callable[[int], None] = lambda steps: None,
    method: str | None = None,
) -> tuple[nn.Module, Trajectory, int, list[str]]:
    """The model with the weights of a step, the trajectory, the step, and why they may differ in the last bits (if at all).

    load: dtype → the base model in it. method: see `check`. Raises InputError for another base, and for damage before the step.
    """
    trajectory, steps = open_trajectory(path, until)
    header = trajectory.header
    check(header, path, method)
    try:
        model = load(header.dtype or None)
        named = [f"{key} {header.base[key]}" for key in ("revision", "gguf_file") if header.base.get(key)]
        started = ", ".join([str(header.base.get("name")), *named])
        written = header.base.get("machine") or {}
        here = machine(next(model.parameters()).device) | library_versions(model)
        differ = [f"{k} was {written.get(k)}, is {v}" for k, v in here.items() if written.get(k) != v]
        if is_quantized(model) and any(written.get(key) != here[key] for key in here if key != "zotune"):
            differ.append("the base was quantised elsewhere, maybe to other bits")
        else:
            _compare(header.base.get("sha256"), fingerprint(model), path, f"the run started from ({started})")
        transformers.set_seed(header.seed)  # for an adapter's first values, as in the run
        model = schemes.prepare(model, header.base.get("scheme") or "full", header.base.get("freeze") or ())
        optimizer = optimizer_of(model, header)
    except InputError:
        raise
    except TypeError as error:
        raise InputError(f"{path}: its options are not those of {header.method} ({error})") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not differ or header.base.get("scheme") != "prefix":  # whose first values are the model's own, computed here
        _compare(
            header.base.get("start"), start(model), path, "the run made of its base: the first values of what it trains"
        )
    optimizer.norms = NormsFolder(Path(path).parent / CALIBRATION)
    apply(optimizer, [trajectory.records[i] for i in range(steps)], advance)
    return model, trajectory, steps, differ


def _compare(expected: str | None, found: str, path: str, what: str) -> None:
    if expected and expected != found:
        raise InputError(f"{path}: the model is not the one that {what}: its weights differ")


def optimizer_of(model: nn.Module, header: Header) -> ZeroOrderOptimizer:
    """The optimizer that the run had, before its first step."""
    options = dict(header.method_options)
    optimizer = ZeroOrderOptimizer(
        parameter_groups(model, max(header.decay, default=0.0)),
        header.method,
        lr=0.0,
        seed=header.seed,
        direction=header.direction,
        engine=header.engine,
        **options,
    )
    if len(optimizer.param_groups) != header.groups:
        raise ValueError(f"the header has {header.groups} parameter groups, this model {len(optimizer.param_groups)}")
    optimizer.pairs = header.pairs // (optimizer.method.queries * len(optimizer.blocks))
    optimizer.folds_by_query = "forward_tokens" not in header.method_options  # as it was before places shared a forward
    return optimizer


def apply(
    optimizer: ZeroOrderOptimizer, records: Sequence[Record], advance: Callable[[int], None] = lambda steps: None
) -> None:
    """Do to the weights what the recorded steps did, in order; many steps in a pass where a step is a list of coefficients."""
    for first in range(0, len(records), AT_ONCE):
        some = records[first : first + AT_ONCE]
        optimizer.apply_records(some)
        advance(len(some))


def described(trajectory: Trajectory, steps: int, differ: Sequence[str]) -> str:
    """One line on what was rebuilt, and how exactly."""
    header = trajectory.header
    exact = "bit for bit the run's" if not differ else f"the run's within rounding ({'; '.join(differ)})"
    line = f"step {steps} of {header.planned_steps}, {header.method} on {header.base.get('name')}: weights are {exact}"
    return plain(line)
