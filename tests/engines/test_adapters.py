"""LoRA's term by kernels: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from contextlib import nullcontext

import families
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from zotune import ZeroOrderOptimizer
from zotune.directions import Displacement
from zotune.engines import dual, parts
from zotune.engines.modules import FusedModules
from zotune.engines.parts import Parts, Values
from zotune.models.schemes import get_scheme

pytest.importorskip("triton")

from zotune.engines import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense(values: Values) -> torch.Tensor:
    """(P, O, D) float64: each part's matrix as a whole."""
    w = values.w.double()
    if values.u is None:
        return w
    moved = torch.bmm(values.u.double(), values.v.double().transpose(1, 2))
    return w + values.scale.double()[:, None, None] * moved[values.which.long()]


def made(draw, count, groups, shape, factors, dtype) -> Values:
    """A matrix of `count` parts: a stack (factors 0), or one for all with low-rank terms of so many factors."""

    def normal(*sizes):
        return torch.randn(*sizes, generator=draw).to(DEVICE, dtype)

    if not factors:
        return Values(normal(count, *shape))
    u, v = (normal(groups, side, factors) for side in shape)
    scale = torch.randn(count, generator=draw).to(DEVICE) / 3
    which = torch.randint(0, groups, (count,), generator=draw, dtype=torch.int32).to(DEVICE)
    return Values(normal(*shape).expand(count, *shape), u, v, scale, which)


sizes = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 3]),
        "rows": st.sampled_from([1, 5, 16, 35]),
        "wide": st.sampled_from([1, 7, 128, 300]),
        "out": st.sampled_from([1, 20, 128, 150]),
        "rank": st.sampled_from([1, 4, 8, 16, 64]),
        "factors": st.sampled_from([0, 1, 4]),
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(sizes=sizes, own=st.sampled_from([torch.float32, None]))
@settings(max_examples=10)
def test_the_kernels_add_each_part_s_term(dtype, sizes, own):
    """own: the adapter's dtype, None for x's."""
    s, draw = sizes, torch.Generator().manual_seed(0)
    count = 2 * s["groups"]
    a = made(draw, count, s["groups"], (s["rank"], s["wide"]), s["factors"], own or dtype)
    b = made(draw, count, s["groups"], (s["out"], s["rank"]), s["factors"], own or dtype)
    x, y = (torch.randn(count, s["rows"], n, generator=draw).to(DEVICE, dtype) for n in (s["wide"], s["out"]))
    t = kernels.adapter_inner(x, a)
    wanted = torch.bmm(x.double(), dense(a).transpose(1, 2))
    assert t.dtype == torch.float32
    bits = 2e-6 if dtype == torch.float32 else 1e-4  # of A: two halves of a narrow format
    size = torch.bmm(x.double().abs(), dense(a).abs().transpose(1, 2))
    assert bool(((t.sum(0).double() - wanted).abs() <= bits * size + 1e-6).all())
    total = y.double() - 0.5 * torch.bmm(t.sum(0).double(), dense(b).transpose(1, 2))
    size = torch.bmm(t.sum(0).double().abs(), dense(b).abs().transpose(1, 2))
    kernels.adapter_outer(y, t, b, -0.5)
    once = torch.finfo(dtype).eps / (2 if DEVICE == "cuda" else 1)  # the interpreter truncates to 16 bits
    assert bool(((y.double() - total).abs() <= once * total.abs() + 2e-6 * size + 1e-6).all())


def test_rows_that_do_not_fill_a_gpu_are_cut_and_the_cuts_add_up():
    draw = torch.Generator().manual_seed(0)
    a = made(draw, 2, 1, (8, 700), 1, torch.float32)
    x = torch.randn(2, 5, 900, generator=draw).to(DEVICE)[..., :700]  # with gaps between its rows
    t = kernels.adapter_inner(x, a)
    assert 1 < len(t) <= kernels.MOST_SLICES
    torch.testing.assert_close(t.sum(0).double(), torch.bmm(x.double(), dense(a).mT), rtol=1e-5, atol=1e-4)


class Counted:
    """How often the kernels were called."""

    def __init__(self, monkeypatch) -> None:
        self.calls = {"adapter_inner": 0, "adapter_outer": 0}
        for name in self.calls:
            monkeypatch.setattr(kernels, name, self._counting(name, getattr(kernels, name)))

    def _counting(self, name, real):
        def call(*args):
            self.calls[name] += 1
            return real(*args)

        return call

    @property
    def both(self) -> int:
        assert len({*self.calls.values()}) == 1
        return self.calls["adapter_inner"]


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(parts, "KERNEL_DEVICES", {DEVICE})
    return Counted(monkeypatch)


def adapted(family: str) -> nn.Module:
    """A tiny model with adapters that are not 0."""
    model = get_scheme("lora").prepare(families.build(family))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.to(DEVICE).eval()


def rows_of(model):
    def rows(batch):
        logits = model(input_ids=batch["ids"]).logits[:, -1].float()
        return -logits.log_softmax(-1)[:, 7]

    return rows


BATCH = {"ids": torch.tensor([[1, 2, 3], [5, 4, 3]], device=DEVICE)}


def optimizer_of(model, **engine) -> ZeroOrderOptimizer:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return ZeroOrderOptimizer(trained, lr=0.0, eps=1e-2, **engine)


def own_forwards(model) -> bool:
    return not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("llama", {"engine": "dual"}),
        ("opt", {"engine": "dual"}),
        ("llama", {"groups": "batch"}),
        ("opt", {"groups": "batch", "rank": 4}),
        ("opt", {"engine": "lowrank"}),
        ("llama", {"engine": "lowrank", "rank": 8}),  # no less than the adapters': they are dense
    ],
)
def test_kernels_give_the_losses_of_peft_s_forward(family, engine, monkeypatch, counted):
    model, found, calls = adapted(family), [], []
    for used in (True, False):
        monkeypatch.setattr(parts, "KERNEL_DEVICES", {DEVICE} if used else set())
        optimizer = optimizer_of(model, **engine)
        optimizer.step(rows_of(model), batch=BATCH)  # by a forward that learns, and one by what it has learned
        assert optimizer.engine.usable, optimizer.engine.why
        assert own_forwards(model)
        found.append(torch.tensor(optimizer.last.losses_P))
        calls.append(counted.both)
    assert calls[1] == calls[0] >= 4  # two maps in each of two layers
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


def test_a_forward_that_raises_leaves_every_module_its_own(counted):
    model = adapted("opt")
    engine, seen, at = optimizer_of(model, engine="dual").engine, [], Displacement((5,), ((1e-2,),))
    families.both(engine, rows_of(model), BATCH, at)

    def fail(*args):
        seen.append(own_forwards(model))
        raise torch.OutOfMemoryError

    model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        families.both(engine, rows_of(model), BATCH, at)
    assert seen == [False]
    assert own_forwards(model)


class Map:
    """One adapted map of a model under `dual`, and what it gives for a doubled batch by kernels and without."""

    def __init__(self, base=None, dtype=torch.float32, trains="lora_", **changes) -> None:
        torch.manual_seed(0)
        self.config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0"]} | changes)
        bare = nn.Sequential(base or nn.Linear(12, 10)).to(dtype)
        self.model = peft.get_peft_model(bare, self.config).to(DEVICE).eval()
        for name, p in self.model.named_parameters():
            p.requires_grad_(trains in name)
            if "lora_B" in name:
                nn.init.normal_(p)
        self.layer = self.model.base_model.model[0]
        self.x = torch.randn(4, 3, self.layer.in_features, dtype=dtype, device=DEVICE)

    def outputs(self, x=None, **more) -> list[torch.Tensor]:
        """By the module's own forward, and with kernels standing in where they may."""
        x, engine = self.x if x is None else x, optimizer_of(self.model, engine="dual").engine
        fused, found = FusedModules(engine.directions.params), []
        with torch.no_grad(), fused.learning():
            self.layer(x)
        assert fused
        for by in (nullcontext, fused.standing_in):
            torch.manual_seed(1)
            with (
                torch.no_grad(),
                engine._reads(Displacement((5,), ((1e-1,),)), Parts((2, 2), (0, 0), (1, -1))) as mode,
                by(mode),
            ):
                found.append(self.layer(x, **more))
        return found


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("plain", {}),
        ("a_frozen_a", {"trains": "lora_B"}),
        ("another_scaling", {"use_rslora": True}),
        ("a_scaling_that_changes", {}),
        ("dropout_that_rests", {"lora_dropout": 0.5}),
        ("a_kept_output", {}),
        ("its_own_input", {"base": nn.Linear(12, 12)}),
        ("another_base", {"base": Conv1D(10, 12), "fan_in_fan_out": True}),
        ("rows_apart", {}),
    ],
)
def test_a_plain_adapter_is_served_whatever_is_around_it(how, changes, counted):
    map, kept = Map(**changes), []
    x = map.x
    if how == "a_scaling_that_changes":
        map.layer.scaling["default"] = 0.3
    if how == "a_kept_output":
        map.layer.base_layer.register_forward_hook(lambda m, args, y: kept.append((y, y.clone())))
    if how == "its_own_input":
        map.layer.base_layer.forward = lambda x: x
    if how == "rows_apart":
        x = torch.randn(4, 3, 20, device=DEVICE)[..., :12]
    before = x.clone()
    own, ours = map.outputs(x)
    assert counted.both == 1
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    assert all(torch.equal(*pair) for pair in kept)


def test_sums_of_narrow_formats_are_rounded_once(counted):
    """Against the same in float64: PEFT's forward in float64 at the weights that the narrow model has."""
    map = Map(dtype=torch.bfloat16)
    assert map.layer.lora_A["default"].weight.dtype == torch.float32
    _, ours = map.outputs()
    wide = Map().model.double()
    wide.load_state_dict(map.model.state_dict())
    exact = Map()
    exact.model, exact.layer = wide, wide.base_model.model[0]
    wanted, _ = exact.outputs(map.x.double())
    assert counted.both == 1
    assert ours.dtype == torch.bfloat16
    # base's outputs are rounded before, and the sum; the interpreter truncates
    torch.testing.assert_close(ours.double(), wanted, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=2e-2)


@pytest.mark.parametrize("how", [
    "a_hook", "a_pre_hook", "a_hook_on_dropout", "a_forward_of_somebody_s", "two_adapters", "merged", "disabled", "dora", "dropout",
    "a_bias", "a_large_rank", "a_transposed_x", "a_further_argument", "float64",
])  # fmt: skip
def test_what_is_more_than_a_plain_adapter_computes_as_it_is_written(how, counted):
    changes = {
        "dora": {"use_dora": True},
        "dropout": {"lora_dropout": 0.5},
        "a_bias": {"lora_bias": True},
        "a_large_rank": {"r": 65},
        "float64": {"dtype": torch.float64},
    }.get(how, {})
    map = Map(**changes)
    layer, x, more, seen = map.layer, map.x, {}, []
    a, b, dropout = layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]
    if how == "a_hook":
        a.register_forward_hook(lambda m, args, y: seen.append(y))
    elif how == "a_pre_hook":
        b.register_forward_pre_hook(lambda m, args: seen.append(args))
    elif how == "a_hook_on_dropout":
        dropout.register_forward_hook(lambda m, args, y: seen.append(y))
    elif how == "a_forward_of_somebody_s":
        a.forward = lambda x: 2 * nn.functional.linear(x, a.weight)
    elif how == "two_adapters":
        map.model.add_adapter("other", map.config)
        nn.init.normal_(layer.lora_B["other"].weight)
        map.model.base_model.set_adapter(["default", "other"])
    elif how == "merged":
        layer.merge()
    elif how == "disabled":
        layer.enable_adapters(False)
        for p in (a.weight, b.weight):
            p.requires_grad_(True)
    elif how == "dropout":
        map.model.train()
    elif how == "a_transposed_x":
        x = torch.randn(4, 12, 3, device=DEVICE).transpose(1, 2)
    elif how == "a_further_argument":
        more = {"alora_offsets": None}
    own, ours = map.outputs(x, **more)
    assert counted.both == 0
    assert torch.equal(ours, own)
    assert len(seen) == (3 if "hook" in how else 0)  # once when it was learned, and by each forward


def test_both_matrices_of_wide_maps_are_served(counted):
    """OPT-13B's A has 160 KiB in float32, the B of LLaMA-7B's MLP 344."""
    for base in (nn.Linear(5120, 4), nn.Linear(4, 11008)):
        map = Map(base=base, r=8)
        assert max(p.numel() for p in map.model.parameters() if p.requires_grad) * 4 > dual.SMALL_BYTES
        before = counted.both
        own, ours = map.outputs()
        assert counted.both == before + 1
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((8, 5120), True),
        ((11008, 8), True),
        ((65, 1024), False),
        ((2050, 768), False),
        ((64, 1 << 15), False),
        ((64, 64, 64), False),
    ],
)
def test_only_narrow_matrices_are_drawn_before_a_forward(shape, small):
    assert dual.is_small(torch.empty(shape)) is small
