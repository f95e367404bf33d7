"""Weights that live in host memory and come to the device a block at a time: models larger than the card.

A model's repeated blocks (decoder layers) keep their large parameters on the host, page-locked where the device is CUDA. On the
device there are two or more slots of a block's size. While one block computes, the next ones are copied behind it, and a block
that was changed is copied back, each way on a stream of its own, so that a bus of two directions is used in both.

A parameter is on the device as far as anybody can tell: `param.data` is a view of a slot, of the right shape, dtype and device.
What is in it is the parameter's only from when its block arrives (`Block.arrive`, which the block's forward does by a hook) until
another block arrives. `state_dict` of the module gives the host's tensors, current.
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import InputError

ALIGNED = 256  # bytes: where a parameter begins in its slot
SLOTS = 3  # one computes, one comes, one goes
GIB = 1 << 30


@dataclass(eq=False)
class Block:
    """One module of the repeated ones: its parameters that stream, their values on the host, what they are still to take.

    waiting: updates, in order; each is applied to the block's parameters when the block next arrives.
    """

    of: StreamedWeights
    name: str
    params: list[nn.Parameter]
    host: list[Tensor]
    offsets: list[int] = field(default_factory=list)
    size: int = 0
    waiting: list[Callable[[], Any]] = field(default_factory=list)
    slot: Slot | None = None
    changed: bool = False  # on the device since it was last copied back
    home: Any = None  # the event of the last copy back

    def __post_init__(self) -> None:
        for tensor in self.host:
            self.offsets.append(self.size)
            self.size += -(-_bytes(tensor) // ALIGNED) * ALIGNED

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, self.host))

    def arrive(self) -> None:
        """The block's values are in its parameters, with all updates, from now until another block arrives."""
        self.of.arrive(self)


class Slot:
    """Memory on the device for one block at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: Block | None = None
        self.ready: Any = None  # the event of the copy in
        self.gone: Any = None  # of the last copy back out of it
        self.turn = 0  # when a block last came

    def views(self, block: Block) -> list[Tensor]:
        """A block's tensors in this memory."""
        pairs = zip(block.host, block.offsets, strict=True)
        return [self.memory[at : at + _bytes(t)].view(t.dtype).view(t.shape) for t, at in pairs]


class StreamedWeights:
    """The blocks of one model, in the order of their forwards, and the slots that they share.

    blocks: see `stream`. moved_in, moved_out: bytes over the bus so far.
    """

    def __init__(self, device: torch.device, slots: int) -> None:
        self.device, self.count = device, slots
        self.blocks: list[Block] = []
        self.slots: list[Slot] = []
        self.moved_in = self.moved_out = 0
        self._turn = 0
        self._standing = False
        self._on_card = device.type == "cuda"
        self._in: Any = torch.cuda.Stream(device) if self._on_card else None
        self._out: Any = torch.cuda.Stream(device) if self._on_card else None
        self._pinned: list[int] = []  # addresses of runs of pages
        weakref.finalize(self, _unlock, self._pinned).atexit = False
        self.marked: list[nn.Parameter] = []  # all of the model's, each of which names these weights (`streams`)
        self._hooks: list[Any] = []

    @property
    def host_bytes(self) -> int:
        return sum(block.bytes for block in self.blocks)

    @property
    def slot_bytes(self) -> int:
        return sum(slot.memory.numel() for slot in self.slots)

    def add(self, name: str, module: nn.Module, params: Sequence[nn.Parameter]) -> None:
        """Before `begin`: the next block. Its parameters are on the host; their memory becomes the block's home, page-locked."""
        block = Block(self, name, list(params), [p.data.contiguous() for p in params])
        self.blocks.append(block)
        for param in params:
            param.data = block.host[-1].new_empty(0)  # nobody else holds what was copied to be page-locked
            param.streamed = block  # type: ignore[attr-defined]
        by_name = {id(p): i for i, p in enumerate(params)}
        where = {n: by_name[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if id(p) in by_name}
        self._hooks += [
            module.register_forward_pre_hook(lambda *_: self.arrive(block)),
            module.register_state_dict_post_hook(_Saved(block, where)),
            module.register_load_state_dict_pre_hook(lambda *_: self._open(block)),
            module.register_load_state_dict_post_hook(lambda *_: self._shut(block)),
        ]

    def adopt(self, model: nn.Module) -> None:
        """What of the model does not stream is on the device from now on; adapters that were put on it since, too."""
        for param in model.parameters():
            if not hasattr(param, "streams"):
                param.streams = self  # type: ignore[attr-defined]
                self.marked.append(param)
            if not hasattr(param, "streamed"):
                param.data = param.data.to(self.device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def begin(self) -> None:
        """All blocks are there: page-lock them where they are, and make the slots."""
        if self._on_card:
            self._lock()
        size = max(block.size for block in self.blocks)
        self.slots = [Slot(size, self.device) for _ in range(min(self.count, len(self.blocks)))]
        for block in self.blocks:
            self._point(block, self.slots[0])

    def end(self) -> None:
        """The model as it was before: every parameter is on the host, where its values are, and nothing streams."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            for param, host in zip(block.params, block.host, strict=True):
                param.data = host
                del param.streamed  # type: ignore[attr-defined]
        for param in self.marked:
            del param.streams  # type: ignore[attr-defined]
        _unlock(self._pinned)
        self.slots, self._hooks = [], []

    # A block comes and goes.

    def arrive(self, block: Block) -> None:
        if self._on_card and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "weights that stream cannot be captured as a graph: set optimizer.captured.wanted = False"
            )
        with _quietly():
            self._come(block)
            self._turn += 1
            assert block.slot is not None
            block.slot.turn = self._turn
            first = self.blocks.index(block)
            ahead = [self.blocks[(first + k) % len(self.blocks)] for k in range(1, len(self.slots))]
            keep = {id(block), *map(id, ahead)}
            for coming in ahead:
                self._come(coming, keep)
            if self._on_card:
                torch.cuda.current_stream(self.device).wait_event(block.slot.ready)
            if block.waiting:
                waiting, block.waiting = block.waiting, []
                for update in waiting:
                    update()
                block.changed = True

    def _come(self, block: Block, keep: set[int] | frozenset[int] = frozenset()) -> None:
        if block.slot is not None:
            return
        free = [s for s in self.slots if s.block is None or id(s.block) not in keep]
        slot = min(free, key=lambda s: -1 if s.block is None else s.turn)
        if slot.block is not None:
            self._go(slot.block)
        slot.block, block.slot, slot.turn = block, slot, self._turn
        self._point(block, slot)
        # all that the device was given so far, which may read what is in the slot; and the copies home of it, and of this block
        before = [self._now(), slot.gone, block.home]
        with self._stream(self._in):
            if self._in is not None:
                for event in before:
                    if event is not None:
                        self._in.wait_event(event)
            for view, host in zip(slot.views(block), block.host, strict=True):
                if not self._standing:
                    view.copy_(host, non_blocking=True)
            if self._in is not None:
                slot.ready = self._in.record_event()
        self.moved_in += 0 if self._standing else block.bytes

    def _go(self, block: Block) -> None:
        """Its slot is somebody else's from now on."""
        slot = block.slot
        assert slot is not None
        self._copy_back(block)
        slot.block = block.slot = None

    def _copy_back(self, block: Block) -> None:
        slot = block.slot
        if slot is None or not block.changed or self._standing:
            return
        before = self._now()
        with self._stream(self._out):
            if self._out is not None:
                self._out.wait_event(before)
            for view, host in zip(slot.views(block), block.host, strict=True):
                host.copy_(view, non_blocking=True)
            if self._out is not None:
                block.home = slot.gone = self._out.record_event()
        block.changed = False
        self.moved_out += block.bytes

    def settle(self) -> None:
        """What is on the host is current: no update waits, and no block on the device is newer."""
        for block in self.blocks:
            if block.waiting:
                block.arrive()
        with _quietly():
            for block in self.blocks:
                self._copy_back(block)
        if self._out is not None:
            self._out.synchronize()

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Nothing is copied meanwhile: every block computes on what its slot holds. For measuring what arithmetic alone takes."""
        self.settle()
        self._standing = True
        try:
            yield
        finally:
            self._standing = False
            for slot in self.slots:
                slot.block = None
            for block in self.blocks:
                block.slot, block.changed = None, False

    def refresh(self) -> None:
        """The host's values were replaced (a checkpoint was read into `state_dict`'s tensors): those on the device are old."""
        for block in self.blocks:
            block.changed, block.slot = False, None
            block.waiting.clear()
        for slot in self.slots:
            slot.block = None

    def _open(self, block: Block) -> None:
        """Somebody writes into the block's parameters: they are the host's meanwhile."""
        self.settle()
        for param, host in zip(block.params, block.host, strict=True):
            param.data = host

    def _shut(self, block: Block) -> None:
        if block.slot is not None:
            block.slot.block = None
        block.slot, block.changed = None, False
        self._point(block, self.slots[0])

    def _now(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event() if self._on_card else None

    def _point(self, block: Block, slot: Slot) -> None:
        for param, view in zip(block.params, slot.views(block), strict=True):
            param.data = view

    def _stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def _lock(self) -> None:
        """Page-lock the host's tensors: in place where they have pages for themselves, others as copies in pages of their own.

        Tensors of a heap share pages. A copy to the card of something else in a page that is locked is one that nobody waits for:
        torch takes it for pageable, and its memory may be used again before it is read. So no shared page is locked, and
        none outlives the weights.
        """
        homes = [(block, i) for block in self.blocks for i in range(len(block.host))]
        for block, i in homes:
            if not _alone(block.host[i]):
                block.host[i] = _in_own_pages(block.host[i])
        for first, last, some in _runs_of_pages(homes):
            if _locked(first, last):
                self._pinned.append(first)
                continue
            for block, i in some:  # files' pages, say
                block.host[i] = own = _in_own_pages(block.host[i])
                if not _locked(own.data_ptr(), own.data_ptr() + _bytes(own)):
                    raise InputError(
                        f"--max-gpu-memory: {self.host_bytes / GIB:.1f} GiB of host memory cannot be page-locked; "
                        "raise the limit (ulimit -l), or take a smaller model"
                    )
                self._pinned.append(own.data_ptr())


HEAP = 33 << 20  # bytes from which an allocation has a mapping of its own, in glibc at most 32 MiB


def _alone(tensor: Tensor) -> bool:
    """Whether no other tensor has memory in its pages."""
    return _bytes(tensor) >= HEAP and tensor.untyped_storage().nbytes() == _bytes(tensor)


def _unlock(pinned: list[int]) -> None:
    if pinned:
        torch.cuda.synchronize()
    for first in pinned:
        torch.cuda.cudart().cudaHostUnregister(first)
    pinned.clear()


def _runs_of_pages(homes: Sequence[tuple[Block, int]]) -> Iterator[tuple[int, int, list[tuple[Block, int]]]]:
    """First and last address (exclusive) of runs of pages, and whose tensors are in them."""
    page, found = mmap.PAGESIZE, []
    for block, i in homes:
        at = block.host[i].data_ptr()
        found.append((at // page * page, -(-(at + _bytes(block.host[i])) // page) * page, (block, i)))
    found.sort(key=lambda run: run[0])
    first, last, some = found[0][0], found[0][1], [found[0][2]]
    for begin, end, one in found[1:]:
        if begin < last:
            last = max(last, end)
            some.append(one)
        else:
            yield first, last, some
            first, last, some = begin, end, [one]
    yield first, last, some


def _in_own_pages(tensor: Tensor) -> Tensor:
    memory = torch.frombuffer(mmap.mmap(-1, _bytes(tensor)), dtype=torch.uint8)
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _locked(first: int, last: int) -> bool:
    if int(torch.cuda.cudart().cudaHostRegister(first, last - first, 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # the error stays until somebody asks, and would be the next kernel's
        torch.zeros(1, device="cuda")
    return False


class _Saved:
    """In a module's state_dict its streamed parameters are those of the host, current."""

    def __init__(self, block: Block, where: dict[str, int]) -> None:
        self.block, self.where = block, where

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        self.block.of.settle()
        for name, i in self.where.items():
            if prefix + name in state:
                state[prefix + name] = self.block.host[i]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No mode of torch functions sees what happens here, and no gradient is kept; who reads a slot later may want one."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def streamed(params: Sequence[nn.Parameter]) -> StreamedWeights | None:
    """The streamed weights of the model that these parameters are of; None where nothing of it streams."""
    return next((param.streams for param in params if hasattr(param, "streams")), None)


def homes(model: nn.Module) -> dict[str, Tensor]:
    """The host's tensors of a model's streamed parameters, by name; current after `StreamedWeights.settle`."""
    found = {}
    for name, param in model.named_parameters():
        if (block := getattr(param, "streamed", None)) is not None:
            found[name] = block.host[next(i for i, p in enumerate(block.params) if p is param)]
    return found


# A model's plan.


@dataclass(frozen=True)
class Plan:
    """What streams of a model, in bytes. blocks: (name, module, its parameters that stream). room: of a slot, the largest block's.

    stays: of all else, which is on the device for good.
    """

    blocks: list[tuple[str, nn.Module, list[nn.Parameter]]]
    room: int
    stays: int

    @property
    def streams(self) -> int:
        return sum(_bytes(p) for _, _, params in self.blocks for p in params)

    @property
    def all(self) -> int:
        return self.streams + self.stays

    def slots(self, budget: int, reserve: int) -> int:
        """How many slots a budget of so many bytes has room for, beside a reserve for activations. Raises InputError."""
        count = min(SLOTS, len(self.blocks), (budget - self.stays - reserve) // self.room)
        if count < min(2, len(self.blocks)):
            least = self.stays + 2 * self.room + reserve
            raise InputError(
                f"--max-gpu-memory {budget / GIB:.2f}GiB: too little: two blocks take {2 * self.room / GIB:.2f} GiB, what stays "
                f"on the card (embedding, head, vectors) {self.stays / GIB:.2f}, activations {reserve / GIB:.2f}; give "
                f"{math.ceil(least / GIB * 100) / 100:.2f}GiB at least"
            )
        return int(count)


def plan(model: nn.Module, stays: Callable[[nn.Parameter], bool]) -> Plan:
    """The model's repeated blocks: the members of its `nn.ModuleList`s, the outermost, that hold most of its parameters.

    stays: which parameters of a block do not stream: small ones, which engines draw for a whole forward at once. A parameter that
    stands outside the blocks too, or in two of them (tied), stays. Raises InputError where nothing streams.
    """
    inside: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other, _ in inside):
            inside += [(f"{name}.{i}", one) for i, one in enumerate(module)]
    times: dict[int, int] = {}
    for _, param in _all(model):
        times[id(param)] = times.get(id(param), 0) + 1
    blocks, size = [], 0
    for name, module in inside:
        params = [p for _, p in _all(module) if times[id(p)] == 1 and p.is_contiguous() and not stays(p)]
        if params:
            blocks.append((name, module, params))
            size += sum(map(_bytes, params))
    if not blocks:
        raise InputError(
            f"--max-gpu-memory: {type(model).__name__} has no repeated layers (members of an nn.ModuleList with matrices) to "
            "stream; leave the option out"
        )
    room = max(sum(-(-_bytes(p) // ALIGNED) * ALIGNED for p in params) for _, _, params in blocks)
    kept = sum(map(_bytes, model.parameters())) + sum(map(_bytes, model.buffers())) - size
    return Plan(blocks, room, kept)


def _all(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def stream(
    model: nn.Module,
    found: Plan,
    device: torch.device | str,
    slots: int,
    fill: Callable[[nn.Parameter], None] | None = None,
) -> StreamedWeights:
    """Let the planned blocks of a model on the host stream to the device, where everything else goes now.

    fill: gives a parameter of a model on the meta device its memory on the host first. The model's parameters stay the same
    objects; an optimizer has to be made after it.
    """
    weights = StreamedWeights(torch.device(device), slots)
    with _quietly():
        for name, module, params in found.blocks:
            if fill is not None:
                for param in params:
                    fill(param)
            weights.add(name, module, params)
        weights.adopt(model)
        weights.begin()
    gc.collect()
    return weights
