"""What holds of the process while a run lasts: who is told to stop, which algorithms torch may take, tensor cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zotune.errors import InputError, NonFiniteLoss, NotFinite


class Interrupted(Exception):
    """The run was asked to stop, and has saved. `code` is the exit code: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def signals(asked: Callable[[int], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM are told to `asked`, by number. A second one is not caught."""

    def stop(number: int, frame: Any) -> None:
        asked(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: whoever runs us has the signals
        pass
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms of torch that give the same bits each time; what has none is refused."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a debugging aid that writes all scratch once more
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(f"--deterministic: {str(error).split('. ')[0]}; run without it") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Tensor cores for products of float32 tensors; weights, noise and updates stay float32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, wanted or matmul.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@contextmanager
def stops_the_run(what: str) -> Iterator[None]:
    """Scores that are not finite end a run as losses that are not do."""
    try:
        yield
    except NotFinite as error:
        raise NonFiniteLoss(f"{what}: {error}") from None
