"""Buffers that are used again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from zotune.engines.scratch import SMALL_BYTES, Scratch

KIB = SMALL_BYTES // 1024


def like(kib: int) -> torch.Tensor:
    return torch.empty(kib * 256)


def buffer_of(scratch: Scratch, tensor: torch.Tensor) -> weakref.ref:
    return weakref.ref(scratch._taken[tensor.data_ptr()][0])


def alive(*buffers: weakref.ref) -> list[bool]:
    gc.collect()
    return [buffer() is not None for buffer in buffers]


@pytest.mark.parametrize("keeps", [False, True])
def test_what_is_given_back_is_taken_again(keeps):
    scratch = Scratch(keeps)
    first = scratch.take(like(100))
    place = first.data_ptr()
    scratch.give(first)
    again = scratch.take(like(80))
    assert again.data_ptr() == place
    assert scratch.take(like(80)).data_ptr() != place  # the one is in use
    assert scratch.take(like(KIB // 2)).untyped_storage().nbytes() < SMALL_BYTES


@pytest.mark.parametrize("keeps", [False, True])
def test_a_larger_one_takes_the_place_of_a_smaller_but_where_graphs_write_there(keeps):
    scratch = Scratch(keeps)
    small = scratch.take(like(100))
    held = buffer_of(scratch, small)
    scratch.give(small)
    del small
    large = scratch.take(like(200))
    assert large.numel() == 200 * 256
    assert alive(held) == [keeps]


@pytest.mark.parametrize("keeps", [False, True])
def test_a_view_that_goes_on_is_freed_with_its_last_holder_but_where_graphs_write_there(keeps):
    scratch = Scratch(keeps)
    fresh = scratch.take(like(100))  # within a capture this is the graph's own memory
    held = buffer_of(scratch, fresh)
    scratch.forget(fresh)
    del fresh
    assert alive(held) == [False]
    first = scratch.take(like(100))
    held = buffer_of(scratch, first)
    scratch.give(first)
    again = scratch.take(like(100))
    scratch.forget(again)
    del first, again
    assert alive(held) == [keeps]
    assert scratch.take(like(100)).data_ptr() != 0
    scratch.release()
    assert alive(held) == [False]
