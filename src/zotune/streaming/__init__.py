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
import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import InputError, StorageError
from zotune.streaming.files import Place, Reader, places
from zotune.streaming.packed import to_device
from zotune.streaming.plans import GIB, SLOTS, Plan, aligned, bytes_of, plan

__all__ = ["GIB", "SLOTS", "Block", "Plan", "StreamedWeights", "homes", "plan", "stream", "streamed"]


@dataclass(eq=False)
class Block:
    """One module of the repeated ones: its parameters that stream, their values on the host, what they are still to take.

    params, host: parameters, and scales of packed ones. waiting: updates, in order; each is applied to the block's parameters
    when the block next arrives.
    """

    of: StreamedWeights
    name: str
    params: list[Any]
    host: list[Tensor]
    offsets: list[int] = field(default_factory=list)
    size: int = 0
    waiting: list[Callable[[], Any]] = field(default_factory=list)
    places: list[Place] | None = None  # in a file, of what stays there
    slot: Slot | None = None
    open: bool = False  # while somebody loads values into it
    changed: bool = False  # on the device since it was last copied back
    home: Any = None  # the event of the last copy back

    def __post_init__(self) -> None:
        for tensor in self.host:
            self.offsets.append(self.size)
            self.size += aligned(bytes_of(tensor))

    @property
    def bytes(self) -> int:
        return sum(map(bytes_of, self.host))

    def arrive(self) -> None:
        """The block's values are in its parameters, with all updates, from now until another block arrives."""
        self.of.arrive(self)


class Slot:
    """Memory on the device for one block at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: Block | None = None
        self.ready: Any = None  # the event of the copy in
        self.coming: Any = None  # the same, of what a thread reads from a file first
        self.gone: Any = None  # of the last copy back out of it
        self.turn = 0  # when a block last came

    def views(self, block: Block) -> list[Tensor]:
        """A block's tensors in this memory."""
        pairs = zip(block.host, block.offsets, strict=True)
        return [self.memory[at : at + bytes_of(t)].view(t.dtype).view(t.shape) for t, at in pairs]


class StreamedWeights:
    """The blocks of one model, in the order of their forwards, and the slots that they share.

    blocks, host_memory: see `stream`. moved_in, moved_out: bytes over the bus so far.
    """

    def __init__(self, device: torch.device, slots: int, host_memory: int | None = None) -> None:
        self.device, self.count, self.host_memory = device, slots, host_memory
        self.blocks: list[Block] = []
        self.slots: list[Slot] = []
        self.moved_in = self.moved_out = 0
        self._turn = 0
        self._standing = False
        self._reader: Reader | None = None
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

    @property
    def in_files(self) -> list[Block]:
        return [block for block in self.blocks if block.places is not None]

    def add(self, name: str, module: nn.Module, params: Sequence[Any]) -> None:
        """Before `begin`: the next block. Its parameters are on the host; their memory becomes the block's home, page-locked."""
        block = Block(self, name, list(params), [p.data.contiguous() for p in params])
        self.blocks.append(block)
        for param in params:
            param.data = block.host[-1].new_empty(0)  # nobody else holds what was copied to be page-locked
            param.streamed = block
        by_name = {id(p): i for i, p in enumerate(params)}
        where = {n: by_name[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if id(p) in by_name}
        self._hooks += [
            module.register_forward_pre_hook(lambda *_: self.arrive(block)),
            module.register_state_dict_post_hook(_Saved(block, where)),
            module.register_load_state_dict_pre_hook(
                lambda _, state, prefix, *__: self._open(block, where, state, prefix)
            ),
            module.register_load_state_dict_post_hook(lambda *_: self._shut(block)),
        ]

    def adopt(self, model: nn.Module) -> None:
        """What of the model does not stream is on the device from now on; adapters that were put on it since, too."""
        for param in model.parameters():
            if not hasattr(param, "streams"):
                param.streams = self  # type: ignore[attr-defined]
                self.marked.append(param)
            to_device(param, self.device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def begin(self) -> None:
        """All blocks are there: page-lock them where they are, but for those that stay in their files, and make the slots."""
        size = max(block.size for block in self.blocks)
        if self.host_memory is not None:
            self._leave_in_files(self.host_memory, size)
        if self._on_card:
            self._lock()
        self.slots = [Slot(size, self.device) for _ in range(min(self.count, len(self.blocks)))]
        for block in self.blocks:
            self._point(block, self.slots[0])

    def _leave_in_files(self, room: int, size: int) -> None:
        """As many blocks as the host's memory has no room for, evenly among the others, so that reading never pauses."""
        if self.host_bytes <= room:
            return
        fit, left = 0, room - 2 * size  # beside the two that are being read
        while fit < len(self.blocks) and left >= self.blocks[fit].size:
            left -= self.blocks[fit].size
            fit += 1
        more, count = len(self.blocks) - fit, len(self.blocks)
        staying = [block for i, block in enumerate(self.blocks) if (i + 1) * more // count > i * more // count]
        lie = iter(places([tensor for block in staying for tensor in block.host]))
        for block in staying:
            found = [next(lie) for _ in block.host]
            if None in found:
                raise InputError(
                    f"--max-host-memory: weights of {block.name} are not as a file has them: they were loaded in another dtype "
                    "than the checkpoint's, quantised while they were loaded, or not from safetensors; save the model as it is to "
                    "be trained (save_pretrained) and take that, or leave the option out"
                )
            block.places = [place for place in found if place is not None]
        self._reader = Reader(size, self.device, self._in)

    def end(self) -> None:
        """The model as it was before: every parameter is on the host, where its values are, and nothing streams."""
        self.settle()
        if self._reader is not None:
            self._reader.close()
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            for param, host in zip(block.params, block.host, strict=True):
                param.data = host
                del param.streamed
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
            self._landed(block.slot)
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
        self._landed(slot)
        if slot.block is not None:
            self._go(slot.block)
        slot.block, block.slot, slot.turn = block, slot, self._turn
        self._point(block, slot)
        # all that the device was given so far, which may read what is in the slot; and the copies home of it, and of this block
        before = [event for event in (self._now(), slot.gone, block.home) if event is not None]
        self.moved_in += 0 if self._standing else block.bytes
        if block.places is not None and self._reader is not None and not self._standing:
            slot.coming = self._reader.bring(block.places, block.offsets, slot.memory, before)
            return
        with self._stream(self._in):
            for event in before:
                self._in.wait_event(event)
            for view, host in zip(slot.views(block), block.host, strict=True):
                if not self._standing:
                    view.copy_(host, non_blocking=True)
            if self._in is not None:
                slot.ready = self._in.record_event()

    def _landed(self, slot: Slot) -> None:
        """What was asked of the reader for this slot is on its way over the bus. Raises StorageError where it cannot be read."""
        if slot.coming is None:
            return
        coming, slot.coming = slot.coming, None
        try:
            slot.ready = coming.result()
        except OSError as error:
            if slot.block is not None:
                slot.block.slot = None
            slot.block = None
            raise StorageError(f"--max-host-memory: layers cannot be read: {error}; what was saved is whole") from None

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
        for slot in self.slots:
            self._landed(slot)
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
        self._only_read()
        for slot in self.slots:
            self._landed(slot)
        for block in self.blocks:
            block.changed, block.slot = False, None
            block.waiting.clear()
        for slot in self.slots:
            slot.block = None

    def _only_read(self) -> None:
        if self.in_files:
            raise InputError(
                "--max-host-memory: weights that stay in their files cannot be replaced by others; leave it out"
            )

    def _open(self, block: Block, where: Mapping[str, int], state: Mapping[str, Any], prefix: str) -> None:
        """Somebody writes into the block's parameters, not an adapter's alone: they are the host's meanwhile."""
        if not any(prefix + name in state for name in where):
            return
        self._only_read()
        self.settle()
        block.open = True
        for param, host in zip(block.params, block.host, strict=True):
            param.data = host

    def _shut(self, block: Block) -> None:
        if not block.open:
            return
        block.open = False
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
        homes = [(block, i) for block in self.blocks if block.places is None for i in range(len(block.host))]
        for block, i in homes:
            if not _alone(block.host[i]):
                block.host[i] = _in_own_pages(block.host[i])
        for first, last, some in _runs_of_pages(homes):
            if _locked(first, last):
                self._pinned.append(first)
                continue
            for block, i in some:  # files' pages, say
                block.host[i] = own = _in_own_pages(block.host[i])
                if not _locked(own.data_ptr(), own.data_ptr() + bytes_of(own)):
                    raise InputError(
                        f"--max-gpu-memory: {self.host_bytes / GIB:.1f} GiB of host memory cannot be page-locked; "
                        "raise the limit (ulimit -l), or take a smaller model"
                    )
                self._pinned.append(own.data_ptr())


HEAP = 33 << 20  # bytes from which an allocation has a mapping of its own, in glibc at most 32 MiB


def _alone(tensor: Tensor) -> bool:
    """Whether no other tensor has memory in its pages."""
    return bytes_of(tensor) >= HEAP and tensor.untyped_storage().nbytes() == bytes_of(tensor)


def _unlock(pinned: list[int]) -> None:
    if pinned:
        torch.cuda.synchronize()
    for first in pinned:
        torch.cuda.cudart().cudaHostUnregister(first)
    pinned.clear()


def _runs_of_pages(homes: Sequence[tuple[Block, int]]) -> Iterator[tuple[int, int, list[tuple[Block, int]]]]:
    """First and last address (exclusive) of runs of pages, and whose tensors are in them."""
    page, found = mmap.PAGESIZE, []
    if not homes:
        return
    for block, i in homes:
        at = block.host[i].data_ptr()
        found.append((at // page * page, -(-(at + bytes_of(block.host[i])) // page) * page, (block, i)))
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
    memory = torch.frombuffer(mmap.mmap(-1, bytes_of(tensor)), dtype=torch.uint8)
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


def stream(
    model: nn.Module,
    found: Plan,
    device: torch.device | str,
    slots: int,
    fill: Callable[[nn.Parameter], None] | None = None,
    host_memory: int | None = None,
) -> StreamedWeights:
    """Let the planned blocks of a model on the host stream to the device, where everything else goes now.

    host_memory: bytes of the host's that they may take; blocks beyond stay in the files that the model was loaded from, and are
    read at each forward: of safetensors in the dtype that the model has, and on Linux. What is in files does not train.
    fill: gives a parameter of a model on the meta device its memory on the host first. The model's parameters stay the same
    objects; an optimizer has to be made after it.
    """
    weights = StreamedWeights(torch.device(device), slots, host_memory)
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
