"""One forward over a batch whose rows belong to parts, each of which sees weights of its own.

The first dimension of what a model computes counts rows (or rows × tokens, where it flattens them), part after part. A
`TorchFunctionMode` follows the reads of trainable parameters, as in `zotune.engines.sequential`; a value that was made of
parameters alone (`1 + weight`, a look-up of positions) is kept once a part until it meets the batch.
"""

# P parts, Q directions of F factors, n the size of a first dimension, D and O widths.

from __future__ import annotations

import functools
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zotune.directions import PartsOf
from zotune.engines.attended import attended
from zotune.engines.reads import leaves, reads_no_values


class Unfollowed(Exception):
    """The forward does something that cannot be split by parts; it says what."""


class Parts(PartsOf):
    """A batch whose rows belong to parts, one after the other: how many rows each has, and which direction and sign.

    What was made for them (tables on a device, places of a graph) is found by the object: engines keep one a shape.
    """

    def __init__(
        self, rows_P: Sequence[int], direction_P: Sequence[int], sign_P: Sequence[int], first_P: Sequence[int] = ()
    ) -> None:
        """first_P: the first row of the batch that each part has."""
        super().__init__(direction_P, sign_P)
        self.rows_P, self.first_P = tuple(rows_P), tuple(first_P)
        self._firsts: dict[torch.device, Tensor] = {}
        self.total = sum(self.rows_P)
        self.equal = len({*self.rows_P}) == 1

    @property
    def directions(self) -> int:
        """How many of the displacement's directions they take: the first so many."""
        return max(self.direction_P) + 1

    def firsts(self, device: torch.device) -> Tensor:
        """(P,) int32: first_P, where it stays on the device."""
        if device not in self._firsts:
            self._firsts[device] = torch.tensor(self.first_P, dtype=torch.int32, device=device)
        return self._firsts[device]

    def fits(self, n: int) -> bool:
        """Whether a first dimension of n can be the batch's."""
        return len(self.rows_P) == 1 or (n >= self.total and n % self.total == 0)

    def slices(self, n: int) -> list[slice]:
        if len(self.rows_P) == 1:
            return [slice(0, n)]
        each = n // self.total
        ends = list(accumulate(rows * each for rows in self.rows_P))
        return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]

    def by_part(self, x: Tensor) -> Tensor:
        """(n, …) → (P, n/P, …), a view; parts must be equal."""
        return x.unflatten(0, (len(self.rows_P), x.shape[0] // len(self.rows_P)))

    def rows_of(self, stack: Tensor, n: int) -> Tensor:
        """(P, …) → (n, …): each part's entry for each of its rows."""
        sizes = [s.stop - s.start for s in self.slices(n)]
        if self.equal:
            return stack.repeat_interleave(sizes[0], 0)
        return torch.cat([part.expand(size, *part.shape) for part, size in zip(stack, sizes, strict=True)])


@dataclass
class Parted:
    """The parts' values of one tensor. The model holds the first part's; stack (P, …) or the others are here."""

    stack: Tensor | None
    others: list[Tensor]


@dataclass(frozen=True)
class Values:
    """What the parts' values of a matrix are made of: w[p] + scale[p]·u[which[p]]·v[which[p]]ᵀ, or w[p] alone.

    w: (P, O, D), of stride 0 over parts where they share it. u: (Q, O, F). v: (Q, D, F). scale: (P,) float32. which: (P,) int32.
    """

    w: Tensor
    u: Tensor | None = None
    v: Tensor | None = None
    scale: Tensor | None = None
    which: Tensor | None = None


_IN_PLACE = ("add", "sub", "mul", "div")
_ELEMENTWISE = frozenset(
    [f"{name}_" for name in _IN_PLACE]
    + [f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv") for side in ("", "r", "i")]
    + ["add", "sub", "mul", "div", "true_divide", "neg", "__neg__", "exp", "sigmoid", "tanh", "rsqrt", "sqrt"]
    + ["float", "double", "half", "bfloat16", "to", "type_as"]
)


class PartedReads(TorchFunctionMode):
    """params: those that are perturbed. stacks: (P, *shape) values of some of them, drawn already."""

    # By name: a table of bound methods would be a reference cycle, and keep the stacks until the garbage collector comes.
    special: ClassVar[dict[Any, str]] = {
        F.linear: "_linear",
        F.embedding: "_embedding",
        F.layer_norm: "_layer_norm",
    }

    def __init__(self, parts: Parts, params: Sequence[torch.nn.Parameter], stacks: dict[int, Tensor]) -> None:
        super().__init__()
        self.parts, self.stacks = parts, stacks
        self.seen: set[int] = set()
        self.eps = 0.0  # of the narrowest format that the batch was seen in
        self.watching = False  # in what no perturbed parameter touches too, such as the base under an adapter
        self._params = {id(p) for p in params}
        self._values: dict[int, Parted] = {}
        self._dying: dict[int, Any] = {}

    # What an engine knows how to do. NotImplemented: it does not, for these.

    @abstractmethod
    def copy(self, param: Tensor, part: int) -> Tensor:
        """The part's values of a parameter, as a whole."""

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        """(n, …, O): F.linear of each part with its own weight. bias: (P, O), (O,) or None."""

    @abstractmethod
    def rows(self, ids: Tensor, weight: Tensor) -> Any:
        """(n, …, D): a look-up by each part in its own weight."""

    def gated(self, x: Tensor, a: nn.Module, b: nn.Module, gate: str) -> Tensor | None:
        """gate(a(x))·b(x) of two linear maps (`gating.GATES`), where it is known how in one launch."""
        return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._touched(args) and not (kwargs and self._touched(kwargs.values())):
            if func is F.scaled_dot_product_attention:
                result = _attention(args, kwargs)
                result = attended(func, args, kwargs) if result is NotImplemented else result
            else:
                result = func(*args, **kwargs)
            if self.watching and isinstance(result, Tensor) and result.is_floating_point():
                self.eps = max(self.eps, torch.finfo(result.dtype).eps)
            return result
        if reads_no_values(func):
            return func(*args, **kwargs)
        special = self.special.get(func)
        result = NotImplemented if special is None else getattr(self, special)(*args, **kwargs)
        if result is NotImplemented and func.__name__ in _ELEMENTWISE:
            result = self._elementwise(func, args, kwargs)
        return self._by_parts(func, args, kwargs) if result is NotImplemented else result

    def is_param(self, value: Any) -> bool:
        """Whether this is a perturbed parameter; it counts as read."""
        if id(value) in self._params:
            self.seen.add(id(value))
            return True
        return False

    def is_parted(self, value: Any) -> bool:
        return id(value) in self._params or id(value) in self._values

    def _touched(self, args: Iterable[Any]) -> bool:
        """Asked of every function that a model calls, of which most touch nothing."""
        params, made = self._params, self._values
        for arg in args:
            if id(arg) in params or id(arg) in made or (type(arg) in (list, tuple) and any(map(self.is_parted, arg))):
                return True
        return False

    def is_batch(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.dim() == 0 or self.is_parted(value):
            return False
        if value.is_floating_point():
            self.eps = max(self.eps, torch.finfo(value.dtype).eps)
        return self.parts.fits(value.shape[0])

    def stack_of(self, value: Any) -> Tensor | None:
        """(P, …) of a parameter or of what was made from one, where there is such a stack."""
        if self.is_param(value):
            return self.stacks.get(id(value))
        parted = self._values.get(id(value))
        return None if parted is None else parted.stack

    def values_of(self, param: Tensor) -> Values | None:
        """What the parts' values of a parameter are made of, where they need not be made first; it counts as read."""
        if not self.is_param(param):
            return Values(param.data.expand(len(self.parts.rows_P), *param.shape))
        stack = self.stacks.get(id(param))
        return None if stack is None else Values(stack)

    def _part(self, value: Any, part: int) -> Any:
        if self.is_param(value):
            stack = self.stacks.get(id(value))
            return self.copy(value, part) if stack is None else stack[part]
        parted = self._values.get(id(value))
        if parted is None or part == 0:
            return value
        return parted.others[part - 1] if parted.stack is None else parted.stack[part]

    def _remember(self, first: Tensor, stack: Tensor | None, others: list[Tensor]) -> Tensor:
        """The first part's value, which stands for all of them in the model's hands."""
        key = id(first)
        self._values[key] = Parted(stack, others)

        def forget(_: Any) -> None:
            self._values.pop(key, None)
            self._dying.pop(key, None)

        self._dying[key] = weakref.ref(first, forget)
        return first

    # Small vectors, drawn as stacks: no loop over parts.

    def beside(self, stack: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stack (P, D) and x (n, …, D) so that they broadcast; the second is to be given back by `whole`."""
        if self.parts.equal:
            x = self.parts.by_part(x)
        else:
            stack = self.parts.rows_of(stack, x.shape[0])
        return stack.view(stack.shape[0], *[1] * (x.dim() - 2), stack.shape[-1]), x

    def whole(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1) if self.parts.equal else y

    def _elementwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor) and a.dim() > 0]
        stacks = [self.stack_of(t) for t in tensors]
        if func.__name__ in ("to", "type_as") and stacks[0] is not None and stacks[1:] in ([], [None]):
            made = func(stacks[0], *args[1:], **kwargs)
            return self._remember(made[0], made, [])
        if len(tensors) == 1 and stacks[0] is not None:
            made = func(*(stacks[0] if a is tensors[0] else a for a in args), **kwargs)
            return self._remember(made[0], made, [])
        if len(tensors) != 2 or kwargs:
            return NotImplemented
        (held, x), stack = (tensors, stacks[0]) if stacks[0] is not None else (tensors[::-1], stacks[1])
        if stack is None or stack.dim() != 2 or not self.is_batch(x) or x.dim() < 2:
            return NotImplemented
        if x.shape[-1] not in (1, stack.shape[-1]):
            return NotImplemented
        stack, x_by_part = self.beside(stack, x)
        return self.whole(func(*(stack if a is held else x_by_part if a is x else a for a in args)))

    def _layer_norm(self, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        scale, shift = self.stack_of(weight), self.stack_of(bias)
        if scale is None or scale.dim() != 2 or not self.is_batch(input) or (bias is not None and shift is None):
            return NotImplemented
        kernels = self._in_one_pass(input, scale)
        if kernels is not None and input.shape[-1] <= kernels.LONGEST_NORM:
            return kernels.layer_norm(self.parts.by_part(input).flatten(1, -2), scale, shift, eps).view(input.shape)
        normed = F.layer_norm(input, shape, None, None, eps)
        scale, by_part = self.beside(scale, normed)
        if shift is None:
            return self.whole(by_part * scale)
        return self.whole(torch.addcmul(self.beside(shift, normed)[0], by_part, scale))

    def _in_one_pass(self, y: Tensor, stack: Tensor) -> Any:
        """The kernels, where they can compute y's rows with the parts' values beside them; else None."""
        fits = self.parts.equal and y.dim() > 1 and y.is_contiguous() and y.dtype == stack.dtype
        return kernels_for(y) if fits else None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if not self.is_batch(input) or id(weight) in self._values or weight.dim() != 2:
            return NotImplemented
        shift = self.stack_of(bias)
        if bias is not None and shift is None and self.is_parted(bias):
            return NotImplemented
        stack = self.stack_of(weight)
        if stack is not None:
            if not self.parts.equal:
                return NotImplemented
            x = self.parts.by_part(input).flatten(1, -2)
            y = torch.bmm(x, stack.transpose(1, 2)).view(*input.shape[:-1], -1)
        elif self.is_param(weight):
            return self.product(input, weight, bias if shift is None else shift)
        else:
            y = F.linear(input, weight)
        return y if bias is None else self.plus_bias(y, bias if shift is None else shift)

    def plus_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """y (n, …, O), changed in place, and a bias (P, O) or (O,)."""
        if (kernels := self._in_one_pass(y, bias)) is not None:
            kernels.add_shift(self.parts.by_part(y).flatten(1, -2), bias)
            return y
        if bias.dim() == 1:
            return y.add_(bias)
        stack, by_part = self.beside(bias, y)
        by_part.add_(stack)
        return y

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **more: Any
    ) -> Any:
        if max_norm is not None or not self.is_param(weight) or id(weight) in self.stacks:
            return NotImplemented
        return self.rows(input, weight) if self.is_batch(input) else NotImplemented

    # Anything else: once a part.

    def _by_parts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        count = len(self.parts.rows_P)
        flat = [a for arg in (*args, *kwargs.values()) for a in (arg if type(arg) in (list, tuple) else [arg])]
        batch = [t for t in flat if self.is_batch(t)] if count > 1 else []
        size = max((t.shape[0] for t in batch), default=0)
        slices = self.parts.slices(size) if batch else []

        def own_of(part: int, value: Any) -> Any:
            own = self._part(value, part)
            if batch and isinstance(own, Tensor) and own.dim() and own.shape[0] == size and self.parts.fits(size):
                return own[slices[part]]  # a batch's rows, or a part's value that was spread over all rows
            return own

        results = []
        for part in range(count):
            own = functools.partial(own_of, part)
            results.append(func(*(leaves(a, own) for a in args), **{k: leaves(v, own) for k, v in kwargs.items()}))
        if count == 1:
            return results[0]
        name = getattr(func, "__name__", str(func))
        if not all(isinstance(r, Tensor) for r in results):
            raise Unfollowed(f"{name} of a trainable parameter gives no single tensor")
        if not batch:
            return self._remember(results[0], None, results[1:])
        if any(r.dim() == 0 or r.shape[0] % (s.stop - s.start) for r, s in zip(results, slices, strict=True)):
            raise Unfollowed(f"{name} of a trainable parameter does not keep the rows apart")
        return torch.cat(results)


KERNEL_DEVICES = {"cuda"}


def kernels_for(x: Tensor, file: str = "kernels") -> Any:
    """A file of `zotune.engines` where its kernels serve the tensor: on CUDA, with Triton installed, up to 32 bits; else None."""
    return _kernels(file) if x.device.type in KERNEL_DEVICES and x.dtype != torch.float64 else None


@functools.cache
def _kernels(file: str) -> Any:
    return import_module(f"zotune.engines.{file}") if find_spec("triton") else None


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Causal attention over short rows by one kernel; NotImplemented where torch's own is the way."""
    others = {name: value for name, value in kwargs.items() if name not in ("scale", "enable_gqa")}
    kernels = kernels_for(args[0], "between") if len(args) == 3 and isinstance(args[0], Tensor) else None
    if kernels is None or others.keys() - {"attn_mask", "dropout_p", "is_causal"}:
        return NotImplemented
    mask, dropout, causal = others.get("attn_mask"), others.get("dropout_p", 0.0), others.get("is_causal", False)
    if not kernels.serves_attention(*args, mask, dropout, causal):
        return NotImplemented
    if args[0].shape[1] != args[1].shape[1] and not kwargs.get("enable_gqa"):
        return NotImplemented
    return kernels.short_attention(*args, kwargs.get("scale"))
