"""What models compute between their products by one kernel, beside float64 formulas; in the interpreter where there is no GPU."""

from __future__ import annotations

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from zotune.engines import gating, rotary
from zotune.engines import parts as engine_parts
from zotune.engines.modules import FusedModules
from zotune.step.optimizer import ZeroOrderOptimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(found, wanted, dtype, room=4):
    wanted = wanted.double().to(found.device)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=room * eps, atol=room * max(eps, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", gating.GATES)
def test_a_gate_is_its_formula_rounded_once(gate, dtype):
    from zotune.engines.between import gated

    a, b = drawn(3, 7, 129, dtype=dtype) * 3, drawn(3, 7, 129, dtype=dtype, seed=1)
    a[0, 0, 0], b[0, 0, 1] = torch.nan, torch.nan
    found = gated(a, b, gate)
    assert found[0, 0, :2].isnan().all()
    near(found[1:], (gating.GATES[gate](a.double()) * b.double())[1:], dtype)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(2, 19),
    half=st.integers(1, 20),
    one=st.booleans(),
)
def test_a_rotary_embedding_is_its_formula_however_its_input_lies(rows, heads, group, tokens, half, one):
    from zotune.engines.between import rotary as ours

    width = 2 * half
    q = drawn(rows, tokens, heads * group, width).transpose(1, 2)
    k = drawn(rows, heads, tokens, width, seed=1)
    cos, sin = drawn(1 if one else rows, tokens, width, seed=2), drawn(1 if one else rows, tokens, width, seed=3)
    wanted = modeling_llama.apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    for found, exact in zip(ours(q, k, cos, sin), wanted, strict=True):
        near(found, exact, torch.float32)
        assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "keys", "tokens", "width"), [(3, 1, 5, 16), (4, 4, 17, 24), (6, 2, 33, 64), (1, 1, 64, 80)]
)
def test_attention_over_short_rows_is_that_of_float64(heads, keys, tokens, width, dtype):
    from zotune.engines.between import serves_attention, short_attention

    q = drawn(2, tokens, heads, width, dtype=dtype).transpose(1, 2)
    k, v = drawn(2, keys, tokens, width, dtype=dtype, seed=1), drawn(2, keys, tokens, width, dtype=dtype, seed=2)
    assert serves_attention(q, k, v, None, 0.0, True)
    attention = nn.functional.scaled_dot_product_attention
    for scale in (None, 0.3):
        wanted = attention(q.double(), k.double(), v.double(), is_causal=True, scale=scale, enable_gqa=heads != keys)
        near(short_attention(q, k, v, scale), wanted, dtype)


def test_what_is_no_number_stays_none_and_goes_no_further():
    from zotune.engines.between import short_attention

    q, k, v = (drawn(1, 2, 6, 16, seed=seed) for seed in range(3))
    q[0, 0, 2], k[0, 1, 3] = torch.nan, torch.nan
    seen = short_attention(q, k, v).isnan().all(-1)[0].tolist()
    assert seen == [[False, False, True, False, False, False], [False] * 3 + [True] * 3]


@pytest.mark.parametrize(
    "changed",
    [{"mask": torch.ones(5, 5)}, {"dropout": 0.1}, {"is_causal": False}, {"q": drawn(2, 4, 1, 16)}, {"k": drawn(2, 2, 6, 16)},
     {"q": drawn(2, 3, 5, 16)}, {"v": drawn(2, 2, 5, 8)}, {"q": drawn(2, 4, 16, 5).mT}, {"q": drawn(2, 4, 5, 16).double()}],
)  # fmt: skip
def test_other_attention_is_left_to_torch(changed):
    from zotune.engines.between import serves_attention

    plain = {
        "q": drawn(2, 4, 5, 16),
        "k": drawn(2, 2, 5, 16),
        "v": drawn(2, 2, 5, 16),
        "mask": None,
        "dropout": 0.0,
        "is_causal": True,
    }
    assert serves_attention(**plain)
    assert not serves_attention(**plain | changed)


class Mlp(nn.Module):
    def __init__(self, act, wrong=False):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.wrong = ACT2FN[act], wrong

    def forward(self, x):
        if self.wrong:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_gated_layer_is_known_by_what_it_computes():
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
    assert {act: gating.stand_in(Mlp(act), set()).gate for act in names} == names
    assert gating.stand_in(Mlp("silu", wrong=True), set()) is None
    assert gating.stand_in(Mlp("tanh"), set()) is None
    seen, module = [], Mlp("silu")
    module.gate_proj.register_forward_hook(lambda *args: seen.append(args))
    assert gating.stand_in(module, set()) is not None
    assert not seen


def test_a_rotary_embedding_is_known_by_what_it_computes():
    from transformers.models.glm import modeling_glm  # turns neighbours, not halves

    assert rotary.found(modeling_llama) is not None
    assert rotary.found(modeling_glm) is None
    assert rotary.found(families) is None


@pytest.mark.parametrize("engine", [{"engine": "dual"}, {"engine": "lowrank", "groups": "batch"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "phi3"])
def test_a_model_s_losses_by_kernels_are_those_that_torch_gives(family, engine, monkeypatch):
    from zotune.engines import between

    model = families.build(family).to(DEVICE)
    ids, found, used = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], device=DEVICE), [], set()
    for name in ("gated", "rotary", "short_attention"):
        plain = getattr(between, name)
        monkeypatch.setattr(between, name, lambda *a, name=name, plain=plain: (used.add(name), plain(*a))[1])
    for kernels in (set(), {DEVICE}):
        monkeypatch.setattr(engine_parts, "KERNEL_DEVICES", kernels)

        def rows(batch):
            return -model(input_ids=batch["ids"]).logits[:, -1].float().log_softmax(-1)[:, 7]

        optimizer = ZeroOrderOptimizer(model, lr=0.0, eps=1e-2, **engine)
        for _ in range(2):  # the second has learned what stands in for what
            optimizer.step(rows, batch={"ids": ids})
        assert optimizer.engine.usable, optimizer.engine.why
        found.append(torch.tensor(optimizer.last.g_GQ[0]))
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
    assert used == {"rotary", "short_attention"} | ({"gated"} if family != "phi3" else set())
    file = __import__("sys").modules[type(model).__module__]
    assert not isinstance(getattr(file, rotary.NAME), rotary.Rotary)  # all is as it was


def test_what_stands_in_goes_with_the_block_that_raises():
    model = families.build("llama")
    fused = FusedModules(list(model.parameters()))
    with fused.learning(), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    mlp = model.model.layers[0].mlp

    def broken() -> None:
        with fused.standing_in(None):
            assert isinstance(modeling_llama.apply_rotary_pos_emb, rotary.Rotary)
            assert "forward" in mlp.__dict__
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert not isinstance(modeling_llama.apply_rotary_pos_emb, rotary.Rotary)
    assert "forward" not in mlp.__dict__
