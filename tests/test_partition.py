"""Directions that each reach one random set of the elements (copes): sets, bits that stay, look-ups, records, captured steps."""

from __future__ import annotations

import copy

import pytest
import torch
from test_graphs import pretend
from torch import nn

from zotune import Method, ZeroOrderOptimizer
from zotune.directions import Displacement
from zotune.directions.partition import PartitionedDirections, seed_in
from zotune.errors import OptionError
from zotune.estimators import LeaveOneOut
from zotune.record.trajectory import Record
from zotune.updates import Adam, Normalised

SETS = 4


def directions_of(*shapes: tuple[int, ...], dtype=torch.float32, sets: int = SETS) -> PartitionedDirections:
    torch.manual_seed(0)
    named = [(f"p{i}", nn.Parameter(torch.randn(shape).to(dtype))) for i, shape in enumerate(shapes)]
    return PartitionedDirections([named], "gaussian", sets, seed=7)


@pytest.mark.parametrize("sets", [2, 3, 4, 7])
def test_sets_are_of_about_one_size_and_a_shards_are_those_of_the_whole(sets):
    made = directions_of((129, 127), (5,), sets=sets)
    param = made.params[0]
    whole = made.set_of(param, 0, param.numel())
    share = torch.bincount(whole, minlength=sets) / param.numel()
    torch.testing.assert_close(share, torch.full((sets,), 1 / sets), rtol=0, atol=4 * (1 / sets / param.numel()) ** 0.5)
    assert torch.equal(torch.cat([made.set_of(param, 0, 1001), made.set_of(param, 1001, param.numel() - 1001)]), whole)
    assert len({*made.set_of(made.params[1], 0, 5).tolist()}) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_direction_leaves_every_bit_of_the_other_sets_and_reaches_its_own_sqrt_of_their_number_as_far(dtype):
    made = directions_of((67, 53), dtype=dtype)
    param, out = made.params[0], torch.empty(67, 53, dtype=dtype)
    sets = made.set_of(param, 0, param.numel()).view(67, 53)
    for which in range(SETS):
        made.displaced(param, Displacement((seed_in(12345, which),), ((0.5,),)), out)
        assert torch.equal(out[sets != which], param.data[sets != which])
        moved = (out - param.data)[sets == which].double()
        assert float(moved.std()) == pytest.approx(0.5 * SETS**0.5, rel=0.1)


def test_directions_of_several_sets_are_applied_together_as_one_after_the_other():
    made = directions_of((31, 17), (7,), dtype=torch.float64)
    by = Displacement(tuple(seed_in(900 + 256 * q, q % SETS) for q in range(6)), ((0.1, -0.2, 0.3, 0.4, -0.5, 0.6),))
    start = [p.data.clone() for p in made.params]
    made.apply(by)
    together = [p.data.clone() for p in made.params]
    for param, data in zip(made.params, start, strict=True):
        param.data.copy_(data)
    for q in range(6):
        made.apply(by.some(q, q + 1))
    for param, wanted in zip(made.params, together, strict=True):
        torch.testing.assert_close(param.data, wanted, rtol=0, atol=1e-14)
    assert all(not torch.equal(a, b) for a, b in zip(start, together, strict=True))


def test_rows_that_are_looked_up_are_those_of_the_whole():
    made = directions_of((41, 19))
    param, rows = made.params[0], torch.tensor([3, 40, 3, 0])
    for count in (1, 5):
        by = Displacement(tuple(seed_in(77 + 256 * q, q % SETS) for q in range(count)), ((0.3,) * count,))
        whole = made.displaced(param, by, torch.empty(41, 19))
        assert torch.equal(made.displaced_rows(param, rows, by, torch.empty(4, 19)), whole[rows])


class Small(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.out = nn.Embedding(13, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)

    def losses(self, batch) -> torch.Tensor:
        return self.out(self.table(batch["ids"]).mean(1)).float().square().mean(1)


def batch_of(step: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, 13, (4, 5), generator=torch.Generator().manual_seed(step))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seeds_and_scalars_alone_give_the_weights_again(dtype):
    model, again, records = Small(dtype), Small(dtype), []
    optimizer = ZeroOrderOptimizer(model, "copes", lr=1e-2, eps=1e-2, seed=3, queries=8)
    for step in range(3):
        optimizer.step(model.losses, batch=batch_of(step))
        taken = optimizer.last
        g, lr = (tuple(torch.tensor(x).float().tolist()) for x in (taken.g_GQ[0], taken.lr_G))
        records.append(Record(step, 0.0, 0.0, g, lr, (0.0,)))
    other = ZeroOrderOptimizer(again, "copes", lr=0.0, seed=3, queries=8)
    other.apply_records(records)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(again.out.weight, Small(dtype).out.weight)


def test_a_captured_step_gives_the_weights_of_one_without(monkeypatch):
    """On the CPU: what a graph would hold, run as plain functions."""
    ends = []
    for wanted in (False, True):
        if wanted:
            pretend(monkeypatch)
        model = Small()
        optimizer = ZeroOrderOptimizer(model, "copes", lr=1e-2, eps=1e-2, seed=3, queries=8, weight_decay=0.1)
        optimizer.captured.wanted = wanted
        for step in range(3):
            optimizer.step(model.losses, batch=batch_of(step))
        optimizer.land()
        assert (optimizer.captured.graphs is not None) == wanted
        ends.append(copy.deepcopy(model))
    for p, q in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"queries": 6}, "queries"),
        ({"engine": "dual"}, "engine"),
        ({"groups": "batch"}, "groups"),
        ({"sparsity": 0.5}, "sparsity"),
    ],
)
def test_what_does_not_go_with_sets_is_refused_by_its_name(given, option):
    with pytest.raises(OptionError) as error:
        ZeroOrderOptimizer(Small(), "copes", **given)
    assert error.value.option == option


def test_sets_need_dense_directions_and_a_list_of_coefficients():
    with pytest.raises(ValueError, match="list of coefficients"):
        Method(LeaveOneOut(4), Adam(), sets=4)
    with pytest.raises(OptionError, match="multiple of 3"):
        Method(LeaveOneOut(4), Normalised(), sets=3)
