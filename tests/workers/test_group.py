"""How workers meet, what their messages hold, and what is refused before they do."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.cli.app import run
from zotune.errors import InputError, WorkerError
from zotune.workers.group import join, joined
from zotune.workers.message import Message, batches_sum, weights_sum


@pytest.fixture
def launched(monkeypatch) -> Callable[..., None]:
    """As if torchrun had started two processes, of which this is one."""

    def set_to(port: int, **more: str) -> None:
        told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for name, value in (told | more).items():
            monkeypatch.setenv(name, value)

    return set_to


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # which some images set
    monkeypatch.delenv("RANK", raising=False)
    assert join() is None
    with joined() as alone:
        assert (alone.rank, alone.size, alone.first) == (0, 1, True)
        assert alone.together(lambda: 3) == [3]
        with pytest.raises(InputError, match="mine"):
            alone.from_first(lambda: raising("mine"))


def raising(text: str) -> None:
    raise InputError(text)


def test_a_port_that_is_taken_is_one_line(launched):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched(port)
        with pytest.raises(InputError, match=f"MASTER_PORT localhost:{port}: the port is in use"):
            join(seconds=5)


def test_a_worker_that_nobody_joins_gives_up_with_a_line(launched):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launched(port)
    with pytest.raises(WorkerError, match=r"2 workers did not meet") as error:
        join(seconds=1)
    assert "\n" not in str(error.value)


def test_half_a_launcher_is_said(launched, monkeypatch):
    launched(1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(InputError, match="MASTER_PORT not set"):
        join()


@pytest.mark.parametrize("argv", [["list", "methods"], ["bench", "report", "x"], ["eval", "--model", "x"]])
def test_commands_that_nobody_shares_are_refused_under_a_launcher(launched, argv, capsys):
    launched(1)
    assert run(argv) == 2
    name = " ".join(argv[:2]) if argv[0] == "bench" else argv[0]
    assert capsys.readouterr().err.startswith(f"zotune: zotune {name}: is one process's work")


@given(st.binary(max_size=40), st.integers(-1, 2**31 - 1), st.integers(0, 2**32 - 1))
def test_a_message_comes_back_as_it_was(losses, aside, check):
    message = Message(1, 15, 4, aside, check, check, losses)
    data = message.encode(40)
    assert len(data) == 16 + 40
    assert Message.decode(data) == message._replace(losses=losses.ljust(40, b"\0"))


@given(st.integers(0, 2), st.integers(0, 6), st.integers(0, 15))
def test_no_bit_of_a_weight_can_change_unseen(which, place, bit):
    params = [torch.ones(7, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    before = weights_sum(params)
    bits = params[which].view(torch.int16)
    bits[place] = bits[place] ^ (1 << bit if bit < 15 else -(1 << 15))
    assert weights_sum(params) != before


def test_batches_are_told_apart_by_numbers_names_and_shapes():
    ids = torch.arange(6)
    seen = {
        batches_sum([batch])
        for batch in ({"a": ids}, {"b": ids}, {"a": ids.view(2, 3)}, {"a": ids.flip(0)}, {"a": ids.float()}, {})
    }
    assert len(seen) == 6
