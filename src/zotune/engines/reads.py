"""What every engine that follows reads of parameters asks of a torch function, and the draws that all places of a step share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Properties of a tensor that give its values. The others (shape, dtype, device, …) say nothing of them.
_VALUES = {"data", "T", "mT", "H", "mH", "real"}
_NO_VALUES = {
    "__set__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "element_size",
    "is_floating_point",
    "nelement",
}


def as_written() -> AbstractContextManager[Any]:
    """What torch.compile has made of a model or a loss runs as it was written: a compiled forward reads its parameters past torch
    functions, or would have the perturbation traced into it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def leaves(value: Any, substitute: Callable[[Any], Any]) -> Any:
    """The value with `substitute` of each leaf of its lists and tuples.

    A function of its own: a closure that calls itself is a reference cycle, and what it holds, copies of weights here, would stay
    until the garbage collector comes.
    """
    if type(value) in (list, tuple):
        return type(value)(leaves(inner, substitute) for inner in value)
    return substitute(value)


def reads_no_values(func: Any) -> bool:
    """Whether a torch function asks a tensor for its shape and the like alone."""
    name = getattr(func, "__name__", "")
    return name in _NO_VALUES or (name == "__get__" and getattr(func.__self__, "__name__", "") not in _VALUES)


class same_draws:
    """Called before each probe but the first: torch's generators go back to where they were when this was made."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._cpu: Tensor | None = None  # while a graph is captured there is nothing to look at
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self._cpu = torch.get_rng_state()
        self._cuda = {
            i: torch.cuda.get_rng_state(i) for i in sorted({p.device.index or 0 for p in params if p.is_cuda})
        }

    def __call__(self) -> None:
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
            for i, state in self._cuda.items():
                torch.cuda.set_rng_state(state, i)

    def needed(self) -> bool:
        """Whether somebody has drawn since."""
        return self._cpu is not None and not (
            torch.equal(self._cpu, torch.get_rng_state())
            and all(torch.equal(state, torch.cuda.get_rng_state(i)) for i, state in self._cuda.items())
        )


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
