"""Methods: an estimator and an update rule. The named ones are presets (`zotune.methods.presets`); none has a loop of its own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zotune.errors import OptionError, nearest
from zotune.methods.method import Method
from zotune.methods.presets import METHODS, Preset, preset

__all__ = ["METHODS", "Method", "Preset", "find", "has_eps", "make_method", "preset"]


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
    """The preset of that name; of `module:NAME` what the module has under it, a Method or a function that makes one.

    Only who names a module has it imported, by a flag or in options of their own: nothing that a trajectory says is handed on to
    this.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise OptionError("method", f"unknown method {name!r}; {nearest(name, METHODS)}")
    try:
        made = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"method {name!r}: {error}; write it as module:NAME, of a module that can be imported"
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


def has_eps(name: str | None) -> bool:
    """Whether the named method perturbs weights by eps: its estimate is made of losses at places. None: the default."""
    if name is None:
        return True
    try:
        return make_method(name).kind == "zeroth-order"
    except ValueError:
        return True
