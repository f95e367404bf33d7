"""The group of a run's processes, as torchrun (or whatever sets the same variables) starts them."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zotune.errors import Elsewhere, InputError, NonFiniteLoss, WorkerError
from zotune.workers.launcher import VARIABLES, asked_for
from zotune.workers.message import DREW, FAILED, Message

logger = logging.getLogger(__name__)

T = TypeVar("T")
WAITS = 1800  # seconds for the others, at most: rank 0 may be scoring a large model, or saving one
EVERY = 64  # steps between comparisons of weights
MEETS = 0.05  # seconds between looks for the others at the start


class Workers:
    """The processes of a run, of which this is number `rank` of `size`.

    own_rows: each gives rows of its own to a step, which has all of them; else all give the same, and share out their evaluation.
    sent: bytes of this worker's last message. stop: the signal that all have agreed to stop by; asked: the one that this process
    was sent, which its next message tells. weights, batches: check sums that the next message has, or 0. widths: by engine,
    bytes of a row's loss; 8 until one is known.
    """

    def __init__(self, rank: int, size: int, group: Any = None, own_rows: bool = False) -> None:
        self.rank, self.size, self._group, self.own_rows = rank, size, group, own_rows
        self.sent = 0
        self.asked: int | None = None
        self.stop: int | None = None
        self.weights = self.batches = 0
        self.widths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes the run's folder and talks."""
        return self.rank == 0

    def counts(self, own: int) -> list[int]:
        """How many each has, by rank."""
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._heard():
            dist.all_gather(found, torch.tensor([own]), group=self._group)
        return [int(one) for one in found]

    def exchange(self, mine: Message, size: int, failure: Exception | None = None) -> list[Message]:
        """Everybody's message, by rank. size: bytes of the losses' field. failure: why this one's part was not done.

        Raises where any has failed (the first of them its failure), and where they differ.
        """
        mine = mine._replace(signal=self.asked or 0, weights=self.weights, batches=self.batches)
        self.weights = self.batches = 0
        data = mine.encode(size)
        self.sent = len(data)
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._heard():
            dist.all_gather(found, own, group=self._group)
        told = [Message.decode(one.numpy().tobytes()) for one in found]
        self.stop = max((one.signal for one in told), default=0) or self.stop
        if any(one.status == FAILED for one in told):
            speaker = next(rank for rank, one in enumerate(told) if one.status == FAILED)
            if failure is not None and speaker == self.rank:
                raise failure
            raise Elsewhere(f"worker {speaker} failed", 1)
        if any(one.status == DREW for one in told):
            raise self._said_once(
                InputError(
                    "the loss draws from torch's generators (dropout?): what workers draw would depend on how many they are; call "
                    "model.eval(), or run one process"
                )
            )
        for what, sums in (("weights", [one.weights for one in told]), ("rows", [one.batches for one in told])):
            other = next((rank for rank, one in enumerate(sums) if one != sums[0]), None)
            if other is not None:
                hint = (
                    "give every worker the same batch" if what == "rows" else "go on from what is saved, with --resume"
                )
                said = f"worker {other} has other {what} than worker 0; stopped before this step: {hint}"
                raise self._said_once(WorkerError(said))
        return told

    def _said_once(self, error: Exception) -> Exception:
        """What all workers see at the same time, of which the first tells."""
        return error if self.first else Elsewhere(str(error), exit_code(error))

    def everyone(self, value: T) -> list[T]:
        """Everybody's value, by rank. Any that pickles: between processes of one launch alone."""
        found: list[Any] = [value] * self.size
        if self.size == 1:
            return found
        with self._heard():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def together(self, work: Callable[[], T]) -> list[T]:
        """What everybody's work gives, by rank, once all of it is done; it has to pickle. Where one raises, all do: the first of
        them says why."""
        error: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as raised:
            error = raised
        found = self.everyone((value, None if error is None else exit_code(error)))
        failed = [(rank, code) for rank, (_, code) in enumerate(found) if code is not None]
        if not failed:
            return [one for one, _ in found]
        speaker, code = failed[0]
        if error is not None and speaker == self.rank:
            raise error
        raise Elsewhere(f"worker {speaker} failed", code) from error

    def from_first(self, work: Callable[[], T]) -> T:
        """What worker 0's work gives, or raises."""
        found: list[Any] = self.together(lambda: work() if self.first else None)
        return found[0]

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Others that are gone, or silent for too long, as one line."""
        try:
            yield
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            why = "have been silent for too long" if "imed out" in said or "timeout" in said.lower() else "are gone"
            raise WorkerError(f"the other workers {why}; go on with the same command and --resume") from error


def exit_code(error: Exception) -> int:
    """With which the command line would end."""
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else 2 if isinstance(error, InputError) else 1


def join(seconds: float = WAITS, own_rows: bool = False) -> Workers | None:
    """The group that torchrun has started this process in; None where it has started no other.

    For a loop of your own: every process takes the same steps on the same batches, `ZeroOrderOptimizer(…, micro_batch=M,
    workers=join())`. A process group that torch.distributed has already is used. seconds: to wait for others, at most.
    own_rows: each process gives rows of its own, as a `DistributedSampler` deals them, and a step's are those of all.
    """
    _parts_at_exit()
    if dist.is_initialized():
        size = dist.get_world_size()
        return Workers(dist.get_rank(), size, dist.new_group(backend="gloo"), own_rows) if size > 1 else None
    if (size := asked_for()) == 1:
        return None
    with meeting(seconds) as (store, rank):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    return Workers(rank, size, own_rows=own_rows)


@contextmanager
def meeting(seconds: float = WAITS) -> Iterator[tuple[Any, int]]:
    """A store that the launcher's processes share and no group before them has written to, once all are there; and this one's rank.

    What goes wrong within is of the meeting, and a line: InputError, WorkerError.
    """
    size = asked_for()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE={size}: {', '.join(missing)} not set; start workers by torchrun")
    rank, where = int(os.environ["RANK"]), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=seconds)))
        yield dist.PrefixStore(_met(store, rank, size, seconds), store), rank
    except (RuntimeError, ValueError) as error:  # torch's own kinds are RuntimeErrors
        said = str(error).splitlines()[0]
        if "EADDRINUSE" in said or "in use" in said:
            raise InputError(f"MASTER_PORT {where}: the port is in use; give torchrun another --master-port") from None
        raise WorkerError(f"MASTER_ADDR {where}: {size} workers did not meet ({said[:120]})") from None


@cache
def _parts_at_exit() -> None:
    """A group that is there when the interpreter ends is taken down first: its threads may else abort the process."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def _met(store: Any, rank: int, size: int, seconds: float) -> str:
    """A name for this group's keys, once all of it are known to be there.

    torchrun's store outlives a group, with addresses of processes that are gone. So the first worker offers a fresh name, each
    other answers it with one of its own, and the first says whom it has heard.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set("zotune/offer", own)
    while time.monotonic() < until:
        if not store.check(["zotune/offer"]):
            time.sleep(MEETS)
            continue
        name = store.get("zotune/offer").decode()
        if rank == 0:
            answers = [f"zotune/{own}/{other}" for other in range(1, size)]
            if store.check(answers):
                store.set(f"zotune/{own}/heard", " ".join([own, *(store.get(key).decode() for key in answers)]))
                return f"zotune/{own}"
        else:
            store.set(f"zotune/{name}/{rank}", own)
            if store.check([f"zotune/{name}/heard"]) and own in store.get(f"zotune/{name}/heard").decode().split():
                return f"zotune/{name}"
        time.sleep(MEETS)
    raise RuntimeError(f"after {seconds:.0f} s some are missing")


@contextmanager
def joined(seconds: float = WAITS) -> Iterator[Workers]:
    """`join` for as long as a run lasts. Inside, everybody else in the process sees no launcher: the Trainer takes one process's
    run, whose steps the workers share. Of several on one machine each has a card of its own. Without a launcher, a group of one."""
    local, ours = os.environ.get("LOCAL_RANK"), not dist.is_initialized()
    workers = join(seconds) or Workers(0, 1)
    if workers.size > 1 and local is not None and not torch.cuda.is_initialized() and (cards := _cards()):
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(local) % len(cards)]
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    level = logging.root.manager.disable
    if not workers.first:
        logging.disable(logging.WARNING)
    try:
        yield workers
    except Exception as error:
        if workers.first:
            raise
        if isinstance(error, (WorkerError, InputError)):
            kind = WorkerError if isinstance(error, WorkerError) else InputError
            raise kind(f"worker {workers.rank} ({socket.gethostname()}): {error}") from error
        if isinstance(error, NonFiniteLoss) or getattr(error, "code", None) in (130, 143):
            raise Elsewhere(str(error), exit_code(error)) from error  # all workers end so, and the first says it
        raise
    finally:
        os.environ.update(hidden)
        logging.disable(level)
        if workers.size > 1 and ours and dist.is_initialized():
            dist.destroy_process_group()


def _cards() -> list[str]:
    """What this machine's processes may use, as CUDA_VISIBLE_DEVICES has it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [card for card in given.split(",") if card]
    return [str(card) for card in range(torch.cuda.device_count())]
