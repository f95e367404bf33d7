"""What each scheme trains, where it starts, and that a family of models goes through it."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import families
import pytest
import torch
import transformers as tf
from families import CAUSAL, MASKED, H, V
from torch.utils._python_dispatch import TorchDispatchMode

from zotune import ZeroOrderOptimizer
from zotune.errors import InputError
from zotune.estimates.tally import Allocations
from zotune.models.kinds import kind_of
from zotune.models.schemes import PREFIX_TOKENS, PROMPT_TOKENS, get_scheme, trainable_parameters
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.scoring import answer_losses, score_rows

ROWS = [
    Encoded((3, 9, 4, 7), ((11,), (12,)), 0),
    Encoded((5, 2), ((11,), (12,)), 1),
    Encoded((8, 8, 8), ((11,), (12,)), 0),
]


def prepared(name: str, scheme: str, seed: int = 5):
    model = families.build(name).double()
    torch.manual_seed(seed)
    return get_scheme(scheme).prepare(model).eval()


def logits(model, ids: torch.Tensor, **more) -> torch.Tensor:
    causal = kind_of(model) == "causal"
    with torch.no_grad():
        return model(input_ids=ids, **({"use_cache": False} if causal else {}), **more).logits


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_lora_starts_at_the_model(name):
    ids = torch.randint(2, V, (2, 6))
    torch.testing.assert_close(logits(prepared(name, "lora"), ids), logits(families.build(name).double(), ids))


class FromTheHost(TorchDispatchMode):
    """Counts what goes from the host's memory to the device of the model, on the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # whether a mask is plain; nothing asks that while a graph is captured
        out = func(*args, **(kwargs or {}))
        come, gone = (
            [x for x in torch.utils._pytree.tree_leaves(of) if isinstance(x, torch.Tensor)]
            for of in ((args, kwargs), out)
        )
        if any(t.device.type == "cpu" and t.dim() for t in come) and any(t.is_meta for t in gone):
            self.found.append(func)
        return out


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_a_forward_copies_nothing_from_the_host(name, scheme):
    """PEFT makes ids and masks of virtual tokens on the host, a copy and a wait a forward, which no CUDA graph can hold."""
    try:
        model = prepared(name, scheme).to("meta")
    except InputError:
        pytest.skip(f"{name} has no {scheme}")
    batch = {key: torch.ones((4, 8), dtype=torch.long, device="meta") for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with FromTheHost():
            model(**batch)  # the first may bring its ids along
        with FromTheHost() as seen:
            model(**batch)
    assert seen.found == []
    assert torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
def test_a_forward_leaves_nothing_of_a_device_behind(scheme):
    """Not after one that failed, not for gradients after one without, not for a model that moves on."""
    model = prepared("llama", scheme).float().to("meta")
    (ids,) = model.prompt_tokens.values()
    assert torch.equal(ids, torch.arange(len(ids)))  # what a device makes for itself
    with pytest.raises(RuntimeError):
        model(input_ids=torch.ones((2, 3), device="meta"))  # ids are no floats
    assert torch.ones(1).device.type == "cpu"
    batch = {key: torch.ones((2, 8), dtype=torch.long, device="meta") for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        model(input_ids=batch["input_ids"])
    with FromTheHost():
        model(**batch).logits.sum().backward()
    assert next(p for p in model.parameters() if p.requires_grad).grad is not None
    assert next(iter(model.prompt_tokens.values())) is ids
    moved = copy.deepcopy(model).to_empty(device="cpu")
    assert moved(input_ids=torch.ones((2, 3), dtype=torch.long)).logits.device.type == "cpu"


def test_the_model_s_own_forward_has_no_default_device():
    model, seen = prepared("llama", "prefix").to("meta"), []
    model.get_base_model().model.register_forward_pre_hook(lambda *of: seen.append(torch.ones(1).device.type))
    with torch.no_grad(), FromTheHost():
        model(input_ids=torch.ones((2, 3), dtype=torch.long, device="meta"))
    assert seen == ["cpu"]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_starts_as_real_tokens_before_the_text(name):
    model = prepared(name, "prefix")
    torch.manual_seed(5)
    tokens = torch.randint(0, V, (1, PREFIX_TOKENS))
    ids = torch.randint(2, V, (3, 6))
    whole = torch.cat([tokens.expand(3, -1), ids], 1)
    wanted = logits(families.build(name).double(), whole)[:, PREFIX_TOKENS:]
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-6, atol=1e-6)  # a fresh cache each time
    config = model.get_base_model().config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or H // config.num_attention_heads
    assert trainable_parameters(model) == PREFIX_TOKENS * 2 * 2 * heads * width


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_keeps_no_keys_and_values_that_nobody_asked_for(name):
    """Those of all layers and tokens would be most of a forward's memory."""
    model, ids = prepared(name, "prefix"), torch.randint(2, V, (8, 24))
    found, peaks = [], []
    for use_cache in (True, False):
        with torch.no_grad(), Allocations(model) as live:
            out = model(input_ids=ids, use_cache=use_cache)
        found.append(out.logits)
        peaks.append(live.peak)
        kept = [layer for layer in getattr(out.past_key_values, "layers", ()) if not layer.is_sliding]
        assert {layer.keys.shape[-2] for layer in kept} <= {PREFIX_TOKENS + 24 * use_cache}
        assert kept or not use_cache
    assert torch.equal(*found)
    if not name.startswith("gemma"):  # of two layers one has a window, whose cache goes on as it is
        keys = 8 * 24 * model.peft_config["default"].token_dim * found[0].element_size()  # of the first layer
        assert peaks[0] - peaks[1] > keys


def test_a_prefix_s_cache_is_gone_with_its_forward():
    """Without the collector of cycles: it comes when it likes, and what waits for it is memory."""
    from transformers.cache_utils import DynamicLayer

    model, ids = prepared("llama", "prefix"), torch.randint(2, V, (3, 6))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
            assert not any(isinstance(thing, DynamicLayer) for thing in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prompt_starts_as_real_tokens_before_the_text(name):
    model = prepared(name, "prompt")
    torch.manual_seed(5)
    tokens = torch.randint(0, V, (1, PROMPT_TOKENS))
    ids = torch.randint(2, V, (3, 6))
    wanted = logits(families.build(name).double(), torch.cat([tokens.expand(3, -1), ids], 1))
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-6, atol=1e-6)
    assert trainable_parameters(model) == PROMPT_TOKENS * H


@pytest.mark.parametrize("name", CAUSAL)
def test_a_head_is_trained_alone_and_saved_with_its_own_weights(name, tmp_path):
    model = prepared(name, "head")
    embedding = model.get_input_embeddings().weight.detach().clone()
    optimizer = ZeroOrderOptimizer(model, lr=1e-2)
    optimizer.step(lambda: logits(model, torch.tensor([[3, 4, 5]])).square().mean())
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.equal(model.get_output_embeddings().weight, embedding)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids = torch.randint(2, V, (2, 6))
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("scheme", ["full", "lora", "prefix", "prompt", "head"])
@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_a_step_is_that_of_a_displaced_copy_and_survives_saving(name, scheme, tmp_path):
    import peft

    if (name, scheme) == ("deberta", "prefix"):
        with pytest.raises(InputError, match="takes no keys and values from outside"):
            prepared(name, scheme)
        return
    masked = name in MASKED
    rows = [replace(row, mask=3, tail=(4, 6)) for row in ROWS] if masked else ROWS
    model = prepared(name, scheme)
    base = copy.deepcopy(model)
    batch = Collator("answer", 0)(rows)
    optimizer = ZeroOrderOptimizer(model, lr=1e-3, eps=1e-3, seed=2)
    optimizer.step(lambda b: answer_losses(model, b).double(), batch=batch)
    losses = []
    named = [(n, p) for n, p in base.named_parameters() if p.requires_grad]
    start = [p.detach().clone() for _, p in named]
    z = ZeroOrderOptimizer(named, lr=0.0, seed=2).engine.directions
    from zotune import noise
    from zotune.directions import Displacement

    seed = noise.step_seed(2, 0, 0)
    with torch.no_grad():
        for sign in (1, -1):
            z.apply(Displacement((seed,), ((sign * 1e-3,),)))
            losses.append(answer_losses(base, batch).double().mean())
            for (_, p), w in zip(named, start, strict=True):
                p.copy_(w)
    torch.testing.assert_close(torch.tensor(optimizer.last.losses_P).double(), torch.stack(losses), rtol=1e-5, atol=0)
    with torch.no_grad():
        z.apply(Displacement((seed,), ((-1e-3 * optimizer.last.g_GQ[0][0],),)))
    moved = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(p, w) for p, w in zip(moved, start, strict=True))
    for p, (_, q) in zip(moved, named, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-8)  # lr and g are float32, and so is an adapter
    scores = score_rows(model, rows, batch_size=2, pad_id=0)
    model.save_pretrained(tmp_path)
    if scheme in ("full", "head"):
        auto = tf.AutoModelForMaskedLM if masked else tf.AutoModelForCausalLM
        again = auto.from_pretrained(tmp_path, dtype=torch.float64).eval()
    else:
        again = peft.PeftModel.from_pretrained(families.build(name).double(), str(tmp_path)).eval()
    found = score_rows(again, rows, batch_size=3, pad_id=0)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(scores), rtol=1e-5, atol=1e-6)


def test_counts_are_the_paper_s():
    """OPT-1.3B and LLaMA-2-7B on the meta device; prefix and prompt by their formulas, which the tests above hold to."""
    opt = tf.OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    )
    for config, lora, prefix, prompt in (
        (opt, 1_572_864, 491_520, 20_480),
        (tf.LlamaConfig(), 4_194_304, 1_310_720, 40_960),
    ):
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(config)
        assert trainable_parameters(get_scheme("lora").prepare(model)) == lora
        assert PREFIX_TOKENS * 2 * config.num_hidden_layers * config.hidden_size == prefix
        assert PROMPT_TOKENS * config.hidden_size == prompt


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="prefix"):
        get_scheme("prefx")
