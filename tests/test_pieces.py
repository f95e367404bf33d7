"""`--micro-batch`: rows in pieces, the same losses, and means that no order changes."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zotune
from zotune.record.trajectory import read_file
from zotune.step.pieces import Piece, _mean, _sums, pieces, rows_of

ROWS, TOKENS = 7, 9
losses = st.floats(0, 1e5, width=32)


@given(st.lists(losses, min_size=1, max_size=64), st.data())
def test_a_mean_is_the_exact_sum_rounded_once_however_rows_are_cut_and_ordered(row_losses, data):
    rows = len(row_losses)
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
    parts = [(a, torch.tensor([row_losses[a:b]])) for a, b in pairwise(cuts)]
    order = data.draw(st.permutations(parts))
    bounds = [(0, rows)]
    total = sum(_sums(part, Piece(first, part.shape[1], None), bounds) for first, part in order)
    assert _mean(total, bounds).item() == pytest.approx(math.fsum(row_losses) / rows, rel=2.0**-52, abs=2.0**-60)
    if min(x for x in [*row_losses, 1.0] if x) > 2.0**-42:  # all bits of a float32 over that are multiples of 2⁻⁶⁶
        assert _mean(total, bounds).item() == math.fsum(row_losses) / rows


def test_what_is_not_finite_stays_so():
    for bad in (math.nan, math.inf):
        found = _mean(_sums(torch.tensor([[1.0, bad]]), Piece(0, 2, None), [(0, 2)]), [(0, 2)])
        assert not torch.isfinite(found).any()


def model_and_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return tiny.causal_model(), {"input_ids": torch.randint(0, tiny.VOCABULARY, (ROWS, TOKENS), generator=draw)}


def loss_of(model: nn.Module) -> Any:
    def losses(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1].double()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return losses


@pytest.mark.parametrize(
    "options", [{}, {"groups": "batch", "queries": 2}, {"groups": 3}, {"method": "own-inputs", "queries": 2}], ids=str
)
def test_so_many_rows_at_all_their_places_go_through_a_forward(options):
    model, batch = model_and_batch()
    optimizer = zotune.ZeroOrderOptimizer(model, lr=0.0, micro_batch=3, **options)
    loss = loss_of(model)
    optimizer.step(loss, batch=batch)  # which looks at its first piece more than once
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, named: rows.append(len(named["input_ids"])), with_kwargs=True)
    passes = optimizer.forward_passes
    optimizer.step(loss, batch=batch)
    places = 2 * options.get("queries", 1)
    own = options.get("method") == "own-inputs"
    assert rows == [n for piece in (3, 3, 1) for n in ([piece] if own else []) + [places * piece]]
    assert optimizer.forward_passes - passes == places + own


@pytest.mark.parametrize(
    "options",
    [{}, {"engine": "sequential"}, {"groups": "batch", "queries": 2, "estimator": "leave-one-out"}, {"groups": 3},
     {"method": "zo-sgd-cons"}, {"method": "own-inputs", "queries": 2}, {"blocks": "transformer"}],
    ids=str,
)  # fmt: skip
def test_pieces_give_the_losses_of_the_whole_batch(options):
    found = []
    for micro_batch in (None, 7, 3, 1):
        model, batch = model_and_batch()
        model.double()
        optimizer = zotune.ZeroOrderOptimizer(model, lr=1e-3, eps=1e-2, micro_batch=micro_batch, **options)
        optimizer.step(loss_of(model), batch=batch)
        found.append(torch.tensor(optimizer.last.losses_P, dtype=torch.float64))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-13, atol=0)


def test_pieces_run_on_over_batches_and_lists_are_cut_with_tensors():
    batches = [{"ids": torch.arange(5), "words": list("abcde"), "more": torch.arange(10)}, {"ids": torch.arange(2)}]
    found = list(pieces(batches, 2))
    assert [(p.first, p.rows) for p in found] == [(0, 2), (2, 2), (4, 1), (5, 2)]
    assert found[1].batch["words"] == ["c", "d"]
    assert found[1].batch["more"].tolist() == [4, 5, 6, 7]  # two entries a row
    with pytest.raises(ValueError, match="rows cannot be told apart"):
        rows_of({"ids": torch.arange(5), "uneven": torch.arange(7)}, 5, 0, 2)


def test_what_has_no_rows_to_cut_is_refused():
    model, batch = model_and_batch()
    optimizer = zotune.ZeroOrderOptimizer(model, micro_batch=2)
    with pytest.raises(ValueError, match=r"step\(loss, batch=batch\)"):
        optimizer.step(lambda: loss_of(model)(batch).mean())
    with pytest.raises(ValueError, match="1 numbers for 2 rows; return one a row"):
        optimizer.step(lambda b: loss_of(model)(b).mean(), batch=batch)
    for options in ({"method": "fo-sgd"}, {"method": "forward-grad"}, {"hybrid": 0.5, "fo_lr": 1e-3}):
        with pytest.raises(ValueError, match="differentiates the whole of it"):
            zotune.ZeroOrderOptimizer(model, micro_batch=2, **options)


def test_a_run_records_it_replays_and_goes_on_with_no_other(tmp_path):
    model, data = tiny.save_model(tmp_path / "model"), tiny.save_data(tmp_path / "data", train=20, validation=6, test=6)
    options: dict[str, Any] = {
        "model": str(model), "data": str(data), "template": tiny.TEMPLATE, "label_words": json.loads(tiny.WORDS), "lr": 1e-2,
        "steps": 4, "eval_every": 2, "batch_size": 5, "device": "cpu", "output": str(tmp_path / "run"), "micro_batch": 2,
    }  # fmt: skip
    zotune.train(**options)
    header = read_file(tmp_path / "run" / "trajectory.zot").header
    assert header.method_options["micro_batch"] == 2
    from zotune.cli.app import run

    flags = [
        "--model",
        str(model),
        "--trajectory",
        str(tmp_path / "run" / "trajectory.zot"),
        "--output",
        str(tmp_path / "again"),
    ]
    assert run(["replay", *flags]) == 0
    name = "model.safetensors"
    assert Path(tmp_path / "again" / name).read_bytes() == Path(tmp_path / "run" / "model" / name).read_bytes()
    with pytest.raises(zotune.InputError, match="micro_batch was 2, is 3"):
        zotune.train(**(options | {"micro_batch": 3, "resume": True}))
