"""Methods: an estimator and an update rule. The named ones are presets (`zotune.methods.presets`); none has a loop of its own."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from zotune.errors import OptionError, nearest
from zotune.files.code import named
from zotune.methods.method import Method
from zotune.methods.presets import METHODS, Preset, preset

__all__ = [
    "METHODS",
    "PLUGINS",
    "Method",
    "Preset",
    "find",
    "has_eps",
    "make_method",
    "plugins",
    "preset",
    "queries_of",
    "suggested",
]

PLUGINS = "zotune.methods"  # the group of entry points by which an installed package brings methods
ELSEWHERE = {  # names that other tools have → what it is here
    "adamw": "fo-adam", "adam": "fo-adam", "adamw_torch": "fo-adam", "sgd": "fo-sgd", "backprop": "fo-adam",
    "mezo": "zo-sgd", "spsa": "zo-sgd", "zo": "zo-sgd",
}  # fmt: skip


def plugins() -> dict[str, metadata.EntryPoint]:
    """Methods that installed packages bring, by name; none is imported by this. A name of zotune's own stays zotune's."""
    return {point.name: point for point in metadata.entry_points(group=PLUGINS) if point.name not in METHODS}


def suggested(name: str) -> str:
    """The tail of an error about an unknown method."""
    return nearest(ELSEWHERE.get(name.lower(), name), [*METHODS, *plugins()])


def make_method(of: str | Method, **options: Any) -> Method:
    """The method of a name (see `find`) with its options, or the one that is given, which has its options already.

    An unknown name or option raises ValueError that names the nearest one; so does any option beside a `Method`.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(of, Method):
        if options:
            name = next(iter(options))
            raise OptionError(name, f"{name}={options[name]!r}: method is an object that has its own; give it there")
        return of
    found = find(of)
    known = found.options
    if options.get("queries") == 1 and "queries" not in known:
        del options["queries"]
    for option in options:
        if option not in known:
            raise OptionError(
                option, f"method {of!r} has no option {option!r}; {nearest(option, known) if known else 'it has none'}"
            )
    made = found.build(**options)
    if not isinstance(made, Method):
        raise OptionError("method", f"method {of!r}: gives a {type(made).__name__}; it has to be a zotune.Method")
    return made


def find(name: str) -> Preset:
    """The preset of that name; of `module:NAME` what the module has under it, a Method or a function that makes one; of a
    name that an installed package brings (`plugins`) the same of the `module:NAME` that it stands for.

    Only who names a module has it imported, by a flag or in options of their own: nothing that a trajectory says is handed on to
    this.
    """
    if name in METHODS:
        return METHODS[name]
    point = plugins().get(name) if ":" not in name else None
    if point is None and ":" not in name:
        raise OptionError("method", f"unknown method {name!r}; {suggested(name)}")
    try:
        made = point.load() if point else named(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"method {name!r}: {error}; write it as module:NAME, of a module that can be imported, or is in this folder"
        ) from None
    if isinstance(made, Method):
        return Preset(name, "outside", str(made.forwards), lambda: made)
    if isinstance(made, Preset):
        return Preset(name, made.paper, made.forwards, made.build)
    if not callable(made):
        raise ValueError(
            f"method {name!r}: a {type(made).__name__}; it has to be a zotune.Method, or a function that makes one"
        )
    return Preset(name, "outside", "as it says", made)


def queries_of(members: int, of: str | Method, **options: Any) -> int:
    """How many directions for the same rows give so many perturbed models; antithetic pairs are two of one direction.

    Raises OptionError where they give none, or the method is an object that has another number.
    """
    made = of if isinstance(of, Method) else make_method(of, **options)
    if made.kind != "zeroth-order":
        raise OptionError("method", f"method {of!r}: perturbs no models; es, eggroll and other zeroth-order methods do")
    each = sum(map(abs, made.signs)) // made.queries
    if members % each:
        raise OptionError("members", f"members={members}: of antithetic pairs; give an even number")
    if isinstance(of, Method) and of.queries != members // each:
        raise OptionError("members", f"members={members}: method is an object that has {of.queries * each} of its own")
    return members // each


def has_eps(name: str | None, recorded: bool = False) -> bool:
    """Whether the named method perturbs weights by eps: its estimate is made of losses at places. None: the default.

    recorded: the name is a record's, which has nothing imported; of a method that is none of zotune's it is taken to.
    """
    if name is None or (recorded and name not in METHODS):
        return True
    try:
        return make_method(name).kind == "zeroth-order"
    except ValueError:
        return True
