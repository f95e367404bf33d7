"""Sparse directions, blocks and hybrid training against materialised references, alone and together."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import signed
from zotune.directions.masks import smallest
from zotune.noise import reference
from zotune.record.trajectory import Record
from zotune.step.blocks import partition, shallow

V, H = 96, 32
SIZES = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": V}
MODELS = {
    "llama": (tf.AutoModelForCausalLM, tf.LlamaConfig(**SIZES, num_key_value_heads=2), 5),
    "gpt2": (tf.AutoModelForCausalLM, tf.GPT2Config(vocab_size=V, n_embd=H, n_layer=3, n_head=4, n_positions=64), 6),
    "opt": (
        tf.AutoModelForCausalLM,
        tf.OPTConfig(
            vocab_size=V, hidden_size=H, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=H,
        ),
        6,  # as the paper counts OPT-1.3B's 27: two embeddings, the layers, the last norm
    ),
    "bert": (tf.AutoModelForMaskedLM, tf.BertConfig(**SIZES), None),
    "t5": (tf.AutoModelForSeq2SeqLM, tf.T5Config(vocab_size=V, d_model=H, d_ff=48, num_layers=2, num_heads=4, d_kv=8), 7),
}  # fmt: skip
LR, EPS, SEED = 1e-3, 1e-3, 6


def build(name: str = "gpt2", dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    auto, config, _ = MODELS[name]
    return auto.from_config(copy.deepcopy(config)).to(dtype).eval()


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(3, 8) * 5 % (V - 4) + 2
    logits = model(input_ids=ids).logits
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def z_of(name: str, p: torch.Tensor, seed: int) -> torch.Tensor:
    return reference.normals(torch.arange(p.numel()), seed, noise.parameter_id(name)).double().view(p.shape)


def kept(name: str, p: torch.Tensor, sparsity: float, step: int) -> torch.Tensor:
    seed = noise.step_seed(SEED, step)
    seed_1 = torch.tensor([signed(seed)], device=p.device)
    draw = reference.kept(p.numel(), seed_1, noise.parameter_id(name), round(sparsity * 2**32), 0)
    return draw.view(p.shape)


def loss_at(model: nn.Module, z: dict[str, torch.Tensor], scale: float) -> float:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in z.items():
            other.get_parameter(name).add_(scale * value)
        return loss_of(other).item()


def two_sided(model: nn.Module, z: dict[str, torch.Tensor]) -> float:
    return (loss_at(model, z, EPS) - loss_at(model, z, -EPS)) / (2 * EPS)


def assert_same(model: nn.Module, other: nn.Module, atol: float = 2e-8) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def optimizer_of(model: nn.Module, method: str = "zo-sgd", **options) -> ZeroOrderOptimizer:
    return ZeroOrderOptimizer(model, method, **({"lr": LR, "eps": EPS, "seed": SEED} | options))


# Sparsity


@pytest.mark.parametrize("refresh", [None, 2])
def test_a_sparse_step_masks_probe_and_update_alike(refresh):
    model, hand = build(), build()
    optimizer = optimizer_of(model, sparsity=0.75, mask_refresh=refresh)
    for step in range(4):
        optimizer.step(lambda: loss_of(model))
        drawn = step // refresh * refresh if refresh else 0
        seed = noise.step_seed(SEED, step)
        z = {n: z_of(n, p, seed) * kept(n, p, 0.75, drawn) for n, p in hand.named_parameters()}
        g = two_sided(hand, z)
        with torch.no_grad():
            for n, p in hand.named_parameters():
                p -= LR * g * z[n]
    assert_same(model, hand)
    assert optimizer.state_bytes == 0
    left_out = sum(int((~kept(n, p, 0.75, 0)).sum()) for n, p in hand.named_parameters())
    count = sum(p.numel() for p in hand.parameters())
    assert abs(left_out - 0.75 * count) < 4.5 * math.sqrt(0.75 * 0.25 * count)


@pytest.mark.parametrize("method", ["zo-sgd", "zo-sgd-mmt", "zo-adam", "zo-sgd-sign", "zo-sgd-cons", "forward-grad"])
@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "compensated")],
)
def test_a_weight_that_is_left_out_keeps_its_bits_under_every_method(method, mask, dtype, rounding):
    model, before = build(dtype=dtype), build(dtype=dtype)
    optimizer = optimizer_of(model, method, lr=1e-2, eps=1e-2, sparsity=0.8, mask=mask, rounding=rounding)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
    moved = total = 0
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        keep = kept(name, p, 0.8, 0) if mask == "random" else optimizer.state[p]["kept"].view(p.shape)
        assert torch.equal(p[~keep], q[~keep])
        moved, total = moved + int((p != q).sum()), total + p.numel()
    if method != "zo-sgd-cons":
        assert 0 < moved <= 0.21 * total


def test_magnitude_leaves_out_the_smallest_and_global_counts_all_together():
    model = build("llama")
    optimizer = optimizer_of(model, sparsity=0.5, mask="magnitude")
    optimizer.step(lambda: loss_of(model))
    start = build("llama")
    for (name, p), q in zip(start.named_parameters(), model.parameters(), strict=True):
        keep, size = optimizer.state[q]["kept"].view(p.shape), p.detach().abs()
        assert int((~keep).sum()) == p.numel() // 2, name
        assert size[keep].min() >= size[~keep].max()

    model = build("llama")
    everything = torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    threshold = everything.sort().values[int(0.7 * everything.numel())]
    optimizer = optimizer_of(model, sparsity=0.7, sparsity_scope="global")
    wanted = {n: (p.detach().abs() < threshold).double().mean().item() for n, p in model.named_parameters()}
    optimizer.step(lambda: loss_of(model))
    for n, p in model.named_parameters():
        assert optimizer.state[p]["sparsity"] == pytest.approx(wanted[n], abs=1e-3)
    assert len({round(s, 2) for s in wanted.values()}) > 1


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3e-9, -7.25]), min_size=1, max_size=50), st.data())
def test_the_smallest_are_found_with_ties(values, data):
    k = data.draw(st.integers(0, len(values)))
    edge, ties = smallest([torch.tensor(values)], k)
    bits = torch.tensor(values).abs().view(torch.int32)
    assert int((bits < edge).sum()) + ties == k
    assert ties <= int((bits == edge).sum())


def test_a_magnitude_mask_and_its_ratios_come_back_on_resumption():
    for options in ({"mask": "magnitude", "mask_refresh": 4}, {"sparsity_scope": "global"}):
        whole, half = build(), build()
        one = optimizer_of(whole, sparsity=0.6, **options)
        for _ in range(6):
            one.step(lambda whole=whole: loss_of(whole))
        first = optimizer_of(half, sparsity=0.6, **options)
        for _ in range(3):
            first.step(lambda half=half: loss_of(half))
        second = optimizer_of(half, sparsity=0.6, **options)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(3):
            second.step(lambda half=half: loss_of(half))
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters(), strict=True))


# Blocks


@pytest.mark.parametrize("kind", ["transformer", "attention-mlp", "linear"])
@pytest.mark.parametrize("name", list(MODELS))
def test_blocks_partition_the_parameters_of_any_family(name, kind):
    names = [n for n, _ in build(name).named_parameters()]
    blocks = partition(names, kind)
    assert sorted(n for block in blocks.values() for n in block) == sorted(names)
    if kind == "transformer" and MODELS[name][2]:
        wanted = MODELS[name][2]
        assert len(blocks) == wanted + ("lm_head.weight" in names)
    if kind == "attention-mlp":
        layers = partition(names, "transformer")
        for key in layers:
            if f"{key}.attention" in blocks:
                assert sorted(blocks[f"{key}.attention"] + blocks[f"{key}.mlp"]) == sorted(layers[key])
        assert sum(key.endswith(".attention") for key in blocks) >= 3


def test_a_layer_is_cut_where_its_attention_ends():
    inside = {
        "llama": ({"input_layernorm", "self_attn"}, {"post_attention_layernorm", "mlp"}),
        "gpt2": ({"ln_1", "attn"}, {"ln_2", "mlp"}),
        "opt": ({"self_attn", "self_attn_layer_norm"}, {"fc1", "fc2", "final_layer_norm"}),
        "bert": ({"attention"}, {"intermediate", "output"}),
    }
    for name, (attention, mlp) in inside.items():
        blocks = partition([n for n, _ in build(name).named_parameters()], "attention-mlp")
        for half, wanted in (("attention", attention), ("mlp", mlp)):
            (own,) = (names for key, names in blocks.items() if key.endswith(f".1.{half}"))
            assert {n.split(".1.", 1)[1].split(".")[0] for n in own} == wanted


@pytest.mark.parametrize("update", ["gauss-seidel", "jacobi"])
@pytest.mark.parametrize("kind", ["transformer", "linear"])
def test_a_block_wise_step_is_its_formula(update, kind):
    model, hand, calls = build(), build(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = optimizer_of(model, blocks=kind, block_update=update)
    names = [n for n, _ in hand.named_parameters()]
    for step in range(2):
        optimizer.step(lambda: loss_of(model))
        start = copy.deepcopy(hand)
        for b, block in enumerate(partition(names, kind).values()):
            seed = noise.step_seed(SEED, step, 0, b)
            z = {n: z_of(n, hand.get_parameter(n), seed) for n in block}
            g = two_sided(hand if update == "gauss-seidel" else start, z)
            with torch.no_grad():
                for n in block:
                    hand.get_parameter(n).sub_(LR * g * z[n])
    assert_same(model, hand)
    count = len(partition(names, kind))
    assert len(calls) == optimizer.forward_passes == 2 * 2 * count
    assert optimizer.forwards_a_step == 2 * count


def test_a_block_whose_loss_is_not_finite_stays_and_the_others_move():
    model, before, calls = build(), build(), []

    def closure():
        calls.append(1)
        return loss_of(model) * (math.nan if len(calls) in (3, 4) else 1)

    optimizer = optimizer_of(model, blocks="transformer")
    optimizer.step(closure)
    second = list(partition([n for n, _ in model.named_parameters()], "transformer").values())[1]
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        if name in second:
            assert torch.equal(p, q)
    assert math.isnan(optimizer.last.g_GQ[0][1])
    assert not optimizer.last.skipped


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("zo-sgd", {"blocks": "transformer"}),
        ("zo-sgd-mmt", {"blocks": "attention-mlp", "block_update": "jacobi", "queries": 2, "weight_decay": 0.1}),
        ("zo-adam", {"blocks": "transformer", "sparsity": 0.5, "mask_refresh": 2}),
        ("zo-sgd", {"sparsity": 0.5, "mask": "magnitude", "mask_refresh": 2}),
        ("zo-sgd-cons", {"sparsity": 0.5, "sparsity_scope": "global"}),
        ("forward-grad", {"blocks": "transformer", "sparsity": 0.5}),
    ],
)
def test_what_is_composed_replays_to_the_bits_of_the_run(method, options):
    model, again = build(dtype=torch.float32), build(dtype=torch.float32)
    optimizer, replayed = optimizer_of(model, method, **options), optimizer_of(again, method, **options)
    for _ in range(4):
        optimizer.step(lambda: loss_of(model))
        last = optimizer.last
        record = Record(last.step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped, choice=last.choice)
        replayed.apply_record(record)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), build().float().parameters(), strict=True))


# Hybrid


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_hybrid_step_is_a_zeroth_order_one_and_a_first_order_one(name):
    model, start = build(name), build(name)
    names = [n for n, _ in start.named_parameters()]
    mine = shallow(names, 0.34)
    assert any("embed" in n or "wte" in n for n in mine)
    assert not any("final_layer_norm" in n and "layers" not in n for n in mine)
    assert {n for n in names if ".0." in n} <= mine
    assert not {n for n in names if ".1." in n or ".2." in n} & mine
    optimizer = optimizer_of(model, hybrid=0.34, fo_lr=1e-2)
    optimizer.step(lambda: loss_of(model))
    deep = [n for n in names if n not in mine]
    gradients = torch.autograd.grad(loss_of(start), [start.get_parameter(n) for n in deep])
    z = {n: z_of(n, start.get_parameter(n), noise.step_seed(SEED, 0)) for n in mine}
    g = two_sided(start, z)
    with torch.no_grad():
        for n in mine:
            start.get_parameter(n).sub_(LR * g * z[n])
        for n, gradient in zip(deep, gradients, strict=True):
            start.get_parameter(n).sub_(1e-2 * gradient)
    assert_same(model, start)
    assert optimizer.forward_passes == 3
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_hybrid_training_keeps_no_activation_of_the_shallow_part():
    def kept_bytes(method: str, **options) -> int:
        model = build("llama", torch.float32)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        optimizer = optimizer_of(model, method, **options)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            optimizer.step(lambda: loss_of(model))
        return sum(saved.values())

    whole = kept_bytes("fo-sgd")
    one, two = (kept_bytes("zo-sgd", hybrid=f, fo_lr=1e-3) for f in (0.34, 0.67))
    assert kept_bytes("zo-sgd") == 0
    assert two < one < whole
    assert whole - one == pytest.approx(one - two, rel=0.25)  # a layer each time; the embedding keeps its indices too


def test_hybrid_training_learns_with_momentum_and_resumes():
    whole, half = build(dtype=torch.float32), build(dtype=torch.float32)
    options = {"hybrid": 0.34, "fo_lr": 1e-2, "lr": 1e-4}
    one = optimizer_of(whole, "zo-sgd-mmt", **options)
    losses = [float(one.step(lambda: loss_of(whole))) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    first = optimizer_of(half, "zo-sgd-mmt", **options)
    for _ in range(4):
        first.step(lambda: loss_of(half))
    second = optimizer_of(half, "zo-sgd-mmt", **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(4):
        second.step(lambda: loss_of(half))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters(), strict=True))
    with pytest.raises(ValueError, match="cannot be replayed"):
        second.apply_record(Record(8, 0.0, 0.0, (0.0,), (0.0,), (0.0,)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": "layers"}, "choose from: transformer"),
        ({"blocks": "linear", "method": "zo-sgd-cons"}, "compares one move"),
        ({"blocks": "linear", "groups": 2}, "groups"),
        ({"blocks": "linear", "engine": "dual"}, "engine"),
        ({"hybrid": 0.5, "fo_lr": 1e-3, "blocks": "linear"}, "choose one"),
        ({"hybrid": 0.5}, "needs fo_lr"),
        ({"hybrid": 0.01, "fo_lr": 0.1, "params": "linear"}, "depth"),
        ({"blocks": "transformer", "params": "linear"}, "number of a layer"),
        ({"sparsity": 0.5, "mask": "wandas"}, "wanda"),
        ({"mask_refresh": 3}, "means nothing without sparsity"),
        ({"sparsity": 0.5, "method": "fo-sgd"}, "no direction"),
        ({"fo_lr": 0.1}, "means nothing without hybrid"),
    ],
)
def test_what_cannot_be_composed_is_refused(options, said):
    options = dict(options)
    model = nn.Linear(3, 3) if options.pop("params", None) else build()
    with pytest.raises(ValueError, match=said):
        ZeroOrderOptimizer(model, options.pop("method", "zo-sgd"), **options)
