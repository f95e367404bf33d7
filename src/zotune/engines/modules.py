"""Modules and functions of a model for which one kernel or two stand in, while an engine runs.

What a mode of torch functions cannot see, the module as a whole can show: a norm, a gate or an adapter is several functions, each a
pass over the hidden states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from zotune.engines import adapters, gating, norms, rotary
from zotune.engines.parts import PartedReads


class StandIn(Protocol):
    """How a module is computed by kernels."""

    def forward(self, mode: PartedReads | None, module: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        """What plain, the module's own forward, gives; by it, wherever the kernels do not serve. mode: None where nothing is
        displaced.
        """


# Each says what stands in for a module that reads some of these parameters (by id); None: nothing of its own.
KINDS: tuple[Callable[[nn.Module, set[int]], StandIn | None], ...] = (
    norms.stand_in,
    gating.stand_in,
    adapters.stand_in,
)


class FusedModules:
    """The modules among those that a forward calls for which kernels can stand in."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = {id(p) for p in params}
        self._found: dict[nn.Module, StandIn] = {}
        self._rotary: dict[ModuleType, rotary.Rotary] = {}  # by the file whose function it is
        self._tried: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._found or self._rotary)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Look at each module that is called meanwhile."""
        handle = nn.modules.module.register_module_forward_pre_hook(self._look)
        try:
            yield
        finally:
            handle.remove()
            self._tried.clear()

    def _look(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._tried:
            return
        self._tried.add(id(module))
        with torch._C.DisableTorchFunction():
            known = next(filter(None, (kind(module, self._params) for kind in KINDS)), None)
            file = sys.modules.get(type(module).__module__)
            if file is not None and id(file) not in self._tried:
                self._tried.add(id(file))
                if (function := rotary.found(file)) is not None:
                    self._rotary[file] = function
        if known is not None:
            self._found[module] = known

    @contextmanager
    def standing_in(self, mode: PartedReads | None) -> Iterator[None]:
        """Those modules and functions compute by kernels meanwhile, where they see the batch. mode: None: nothing is displaced."""
        # more may be learned meanwhile; where somebody has put a forward of theirs on a module since, that is what it does
        some = [(module, known) for module, known in self._found.items() if "forward" not in module.__dict__]
        files = [(file, known) for file, known in self._rotary.items() if getattr(file, rotary.NAME) is known.plain]
        for module, known in some:
            module.forward = partial(known.forward, mode, module, module.forward)
        for file, function in files:
            setattr(file, rotary.NAME, function)
        try:
            yield
        finally:
            for module, _ in some:
                del module.forward  # the class's own again
            for file, function in files:
                setattr(file, rotary.NAME, function.plain)
