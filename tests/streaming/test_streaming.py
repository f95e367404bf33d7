"""Weights that stream: a step, a run and its record are those of weights that stay, bit for bit."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import transformers as tf

from zotune.engines.streamed import plan_of
from zotune.errors import InputError
from zotune.models.schemes import get_scheme
from zotune.step.optimizer import ZeroOrderOptimizer
from zotune.streaming import StreamedWeights, homes, stream
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.scoring import candidate_losses

GIB = 1 << 30
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small(layers: int = 5) -> torch.nn.Module:
    torch.manual_seed(0)
    config = tf.OPTConfig(
        hidden_size=256, ffn_dim=512, num_hidden_layers=layers, num_attention_heads=4, word_embed_proj_dim=256, vocab_size=320,
        max_position_embeddings=64,
    )  # fmt: skip
    return tf.OPTForCausalLM(config).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 300, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    return Collator("candidates", 0)([Encoded(tuple(row), ((11,), (12,)), i % 2) for i, row in enumerate(ids)])


def streaming(model: torch.nn.Module, slots: int = 3, device: str = "cpu") -> StreamedWeights:
    return stream(model, plan_of(model), device, slots)


STEPS = {
    "dual": {"engine": "dual"},
    "sequential": {"engine": "sequential"},
    "lowrank": {"engine": "lowrank", "rank": 2},
    "population": {"method": "leave-one-out", "groups": "batch", "queries": 3, "forward_tokens": 100},
    "fold": {"engine": "lowrank", "groups": "batch", "fold_every": 2},
    "auto rate": {"engine": "lowrank", "lr": "auto", "total_steps": 10},
}


def taken(model, options, steps=5, device="cpu"):
    """The records of some steps of an optimizer; weights are current after them."""
    optimizer = ZeroOrderOptimizer(model, **({"lr": 1e-3, "eps": 1e-2} | options))
    optimizer.captured.wanted = False
    records = []
    optimizer.watch = records.append
    rows = {k: v.to(device) for k, v in batch().items()}
    loss = partial(candidate_losses, model)
    for _ in range(steps):
        optimizer.step(loss, batch=rows)
    optimizer.flush()
    return optimizer, records


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_is_that_of_weights_that_stay(options, slots, device):
    stay, go = small().to(device), small()
    weights = streaming(go, slots, device)
    assert len(weights.slots) == slots < len(weights.blocks) == 5
    (_, ours), (_, theirs) = taken(go, options, device=device), taken(stay, options, device=device)
    assert ours == theirs
    state = go.state_dict()
    start = small().state_dict()
    for name, value in stay.state_dict().items():
        assert torch.equal(state[name].to(device), value), name
    assert sum(not torch.equal(state[n].cpu(), start[n]) for n in state) > 40  # they have moved
    assert weights.moved_in > weights.host_bytes


def test_low_rank_steps_write_back_at_a_fold_alone():
    model = small()
    weights = streaming(model)
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, eps=1e-2, engine="lowrank", groups="batch", fold_every=4)
    step = partial(optimizer.step, partial(candidate_losses, model), batch=batch())
    step()  # its first looks again
    step()
    came = weights.moved_in
    step()
    assert weights.moved_in - came == weights.host_bytes  # each block once for all places
    assert weights.moved_out == 0
    step()  # the fold, which waits for the blocks
    assert weights.moved_out == 0
    step()
    weights.settle()
    assert weights.moved_out == weights.host_bytes


def test_a_step_that_updates_crosses_the_bus_once_each_way():
    model = small()
    weights = streaming(model)
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, eps=1e-2, engine="dual")
    step = partial(optimizer.step, partial(candidate_losses, model), batch=batch())
    step()
    step()
    came, went = weights.moved_in, weights.moved_out
    step()
    assert weights.moved_in - came == weights.host_bytes
    assert weights.moved_out - went == weights.host_bytes


@pytest.mark.parametrize("engine", ["dual", "lowrank"])
def test_lora_over_a_base_that_streams_writes_nothing_back(engine):
    def adapted():
        torch.manual_seed(3)
        model = small()
        model.requires_grad_(False)
        return get_scheme("lora").prepare(model)

    stay, go = adapted(), adapted()
    weights = streaming(go)
    (_, ours), (_, theirs) = taken(go, {"engine": engine}), taken(stay, {"engine": engine})
    assert ours == theirs
    weights.settle()
    assert weights.moved_out == 0 < weights.moved_in
    assert all(torch.equal(a, b) for a, b in zip(go.state_dict().values(), stay.state_dict().values(), strict=True))


def test_the_steps_of_a_run_give_it_again():
    go, again = small(), small()
    streaming(go)
    streaming(again)
    _, records = taken(go, STEPS["population"])
    by = ZeroOrderOptimizer(again, **({"lr": 1e-3, "eps": 1e-2} | STEPS["population"]))
    by.apply_now([(by.engine, record) for record in records])
    a, b = go.state_dict(), again.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_between_steps_a_model_says_what_its_weights_say():
    stay, go = small(), small()
    streaming(go)
    taken(stay, STEPS["dual"], 2)
    taken(go, STEPS["dual"], 2)
    rows = batch()
    with torch.no_grad():
        assert torch.equal(candidate_losses(go, rows), candidate_losses(stay, rows))


def test_weights_that_are_loaded_are_those_that_come(tmp_path):
    other, go = small(), small()
    with torch.no_grad():
        for param in other.parameters():
            param.add_(0.01)
    weights = streaming(go)
    go(**{"input_ids": batch()["input_ids"]})  # the old ones are in the slots
    go.load_state_dict(other.state_dict())
    rows = batch()
    with torch.no_grad():
        assert torch.equal(candidate_losses(go, rows), candidate_losses(other, rows))
    go.save_pretrained(tmp_path)
    back = tf.OPTForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), other.parameters(), strict=True))
    weights.end()
    assert all(torch.equal(a, b) for a, b in zip(go.parameters(), other.parameters(), strict=True))
    assert not any(hasattr(p, "streamed") or hasattr(p, "streams") for p in go.parameters())


def test_what_does_not_stream_is_refused():
    model = small()
    streaming(model)
    for options, said in (
        ({"method": "zo-adam"}, "zo-adam"),
        ({"method": "fo-adam"}, "fo-adam"),
        ({"rounding": "compensated"}, "compensated"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"method": "own-inputs"}, "own-inputs"),
        ({"blocks": "transformer"}, "blocks"),
    ):
        with pytest.raises(InputError, match=said):
            ZeroOrderOptimizer(model, **({"lr": 1e-3, "eps": 1e-2} | options))


def test_a_budget_says_how_many_slots_or_the_least():
    found = plan_of(small())
    reserve = 1 << 20
    assert found.slots(found.stays + 3 * found.room + reserve, reserve) == 3
    assert found.slots(found.stays + 3 * found.room + reserve - 1, reserve) == 2
    with pytest.raises(InputError, match="at least"):
        found.slots(found.stays + 2 * found.room + reserve - 1, reserve)
    assert found.all == sum(p.numel() * 4 for p in small().parameters())


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="no repeated layers"):
        plan_of(torch.nn.Sequential(torch.nn.Linear(300, 300)))


def test_homes_are_by_name():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    streaming(model)
    found = homes(model)
    assert found
    assert all(torch.equal(value, before[name]) for name, value in found.items())


def test_runs_of_pages_cover_all_and_share_none():
    import mmap

    from zotune.streaming import _in_own_pages, _runs_of_pages

    model = small()
    weights = streaming(model)
    homes = [(block, i) for block in weights.blocks for i in range(len(block.host))]
    runs = sorted(_runs_of_pages(homes), key=lambda run: run[0])
    assert sum(len(some) for *_, some in runs) == len(homes)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(runs))
    for first, last, some in runs:
        assert first % mmap.PAGESIZE == last % mmap.PAGESIZE == 0
        for block, i in some:
            at, size = block.host[i].data_ptr(), block.host[i].nbytes
            assert first <= at < at + size <= last
    one = weights.blocks[0].host[0]
    own = _in_own_pages(one)
    assert torch.equal(own, one)
    assert own.data_ptr() % mmap.PAGESIZE == 0


def test_a_checkpoint_is_read_into_the_host(tmp_path):
    from zotune.models.loading import load_weights

    other, go = small(), small()
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.5)
    other.save_pretrained(tmp_path)
    streaming(go)
    taken(go, STEPS["lowrank"], 2)
    assert load_weights(go, tmp_path)
    rows = batch()
    with torch.no_grad():
        assert torch.equal(candidate_losses(go, rows), candidate_losses(other, rows))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in go.state_dict().items())


def test_pages_that_others_may_share_are_not_locked(monkeypatch):
    """A heap's tensors move to pages of their own; what was locked is given back when the weights are gone."""
    import gc
    import mmap

    import zotune.streaming as room

    locked, given_back = [], []

    class Runtime:
        cudaHostUnregister = staticmethod(given_back.append)

    monkeypatch.setattr(room, "_locked", lambda first, last: locked.append((first, last)) or True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    weights = streaming(model := small())
    before = {id(t): t.clone() for block in weights.blocks for t in block.host}
    old = [t for block in weights.blocks for t in block.host]
    weights._lock()
    new = [t for block in weights.blocks for t in block.host]
    for one, other in zip(old, new, strict=True):
        assert torch.equal(other, before[id(one)])
        assert other.data_ptr() % mmap.PAGESIZE == 0
        assert any(first <= other.data_ptr() < last for first, last in locked)
        assert not any(first <= one.data_ptr() < last for first, last in locked)
    big = torch.zeros(room.HEAP, dtype=torch.uint8)
    assert room._alone(big)
    assert not room._alone(big[:-1])
    firsts = sorted(weights._pinned)
    del weights, model, new, old, one, other
    gc.collect()
    assert sorted(given_back) == firsts != []
