"""What a mask of Wanda takes from data: the norm of each input feature of every linear map, over some rows.

A run keeps these norms, a file a mask. With them its weights give every mask again, so a replay needs no row of the data.
"""

# N rows and tokens together, I input features, O output features.

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zotune.errors import InputError

CHUNK = 1 << 20  # elements at a time

# A weight's qualified name → float32 norms that broadcast against it: (1, I) where it is (O, I), (I, 1) where it is (I, O).
Norms = Mapping[str, Tensor]


class InputNorms(TorchFunctionMode):
    """Inside, Σ x_j² of each input feature j of every linear map whose weight is one of these, over all calls, in float64.

    A weight is (O, I), as `nn.Linear` has it, or (I, O) where `torch.addmm` reads it, as GPT-2's Conv1D does.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in named.items()}
        self.squares: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self._add(_operands(args, kwargs, "input", "weight"), 0)
        elif func is torch.addmm:
            self._add(_operands(args[1:], kwargs, "mat1", "mat2"), 1)
        return func(*args, **kwargs)

    def _add(self, operands: tuple[Tensor, Tensor], along: int) -> None:
        x, weight = operands
        name = self._names.get(id(weight))
        if name is not None:
            x_NI = x.detach().reshape(-1, x.shape[-1])
            squares = torch.zeros(x_NI.shape[1], dtype=torch.float64, device=x.device)
            for part in x_NI.split(max(1, CHUNK // x_NI.shape[1])):
                squares += part.double().square().sum(0)
            self.squares[name] = self.squares.get(name, 0) + squares.unsqueeze(along)


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any], first: str, second: str) -> tuple[Tensor, Tensor]:
    given = {**dict(zip((first, second), args, strict=False)), **kwargs}
    return given[first], given[second]


def measure(run: Callable[[], Any], named: Mapping[str, Tensor]) -> Norms:
    """The norms of those weights that a linear map reads while `run` evaluates the model. Raises InputError if not finite."""
    with torch.no_grad(), InputNorms(named) as seen:
        run()
    norms = {name: squares.sqrt().float() for name, squares in seen.squares.items()}
    broken = next((name for name, norm in norms.items() if not bool(norm.isfinite().all())), None)
    if broken is not None:
        raise InputError(f"mask='wanda': the inputs of {broken} are not finite; try a smaller lr, or float32")
    return norms


def by_output(weight: Tensor, norm: Tensor) -> Tensor:
    """A view of the weight, or of what has its shape, with a row an output: (O, I)."""
    return weight if norm.shape[1] == weight.shape[1] else weight.t()


def scores(weight: Tensor, norm: Tensor) -> Iterator[Tensor]:
    """|W_oi|·‖x_i‖₂ in float32 (float64 for float64 weights): (o, I), some outputs at a time, in their order.

    Source: Wanda, arXiv 2306.11695, equation 1.
    """
    w_OI = by_output(weight.detach(), norm)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norm_I = norm.to(weight.device, wide).view(-1)
    for part in w_OI.split(chunk_of(weight, norm)):
        yield part.to(wide).abs() * norm_I


def chunk_of(weight: Tensor, norm: Tensor) -> int:
    """o: how many outputs `scores` gives at a time."""
    return max(1, CHUNK // max(by_output(weight, norm).shape[1], 1))


class NormsFolder(MutableMapping[int, Norms]):
    """Norms by the step whose mask they made: `STEP.safetensors` in a folder, each with the SHA-256 of what it holds.

    What is damaged or missing raises InputError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setitem__(self, step: int, norms: Norms) -> None:
        from safetensors.torch import save_file

        self.path.mkdir(exist_ok=True)
        held = {name: norm.detach().cpu().contiguous() for name, norm in norms.items()}
        temporary = self.path / f".{step}.tmp"
        save_file(held, temporary, {"sha256": _digest(held)})
        os.replace(temporary, self._file(step))

    def __getitem__(self, step: int) -> Norms:
        from safetensors import SafetensorError, safe_open

        file = self._file(step)
        try:
            with safe_open(file, "pt") as opened:
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
                expected = (opened.metadata() or {}).get("sha256")
        except FileNotFoundError:
            raise InputError(
                f"{file}: missing; a run with mask wanda keeps the input norms of each mask there: copy the folder "
                f"{self.path.name}/ along with the trajectory"
            ) from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read ({error})") from None
        if _digest(held) != expected:
            raise InputError(f"{file}: damaged, its check sum does not hold")
        return held

    def __delitem__(self, step: int) -> None:
        self._file(step).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(p.stem) for p in self.path.glob("*.safetensors")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _file(self, step: int) -> Path:
        return self.path / f"{step}.safetensors"


def _digest(held: Norms) -> str:
    digest = hashlib.sha256()
    for name, norm in sorted(held.items()):
        digest.update(f"{name} {tuple(norm.shape)}\n".encode() + norm.numpy().tobytes())
    return digest.hexdigest()
