"""Adapters on 8- and 4-bit bases: what the engines compute, and a run from its first step to its replay."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import families
import pytest
import tiny
import torch

import zotune
from zotune import ZeroOrderOptimizer
from zotune.cli.app import run
from zotune.directions import Displacement
from zotune.errors import InputError
from zotune.models import quantized
from zotune.models.loading import load_model
from zotune.models.quantized import inner_tensors, is_changed, is_quantized, weight_bytes
from zotune.models.schemes import get_scheme, trainable_parameters
from zotune.prepare.listener import Listener
from zotune.record.fingerprints import fingerprint

pytest.importorskip("bitsandbytes", reason="zotune[quant] is not installed")
pytest.importorskip("torchao", reason="zotune[quant] is not installed")

NAMES = ["int8", "nf4"]
SCHEMES = ["lora", "prefix", "prompt"]
FAMILIES = [*families.CAUSAL, *families.MASKED]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    tiny.save_data(folder / "data", train=12, validation=6, test=6)
    for name in FAMILIES:
        families.save(name, folder / name, wide=True)
    return folder


def kind_of_family(name: str) -> str:
    return "causal" if name in families.CAUSAL else "masked"


def known(name: str, bits: str) -> bool:
    return (name, bits) != ("gpt2", "int8")  # torchao knows `nn.Linear` alone


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    extra = (
        {}
        if model.config.model_type in families.MASKED or "deberta" in model.config.model_type
        else {"use_cache": False}
    )
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def ids_of(rows: int = 3, tokens: int = 6) -> torch.Tensor:
    return torch.randint(5, 30, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def values_of(weight) -> torch.Tensor:
    """What a packed weight stands for."""
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight.dequantize()
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, state)


# What the quantised model is.


@pytest.mark.parametrize("bits", NAMES)
def test_a_product_is_that_of_the_weights_as_they_were_rounded(material, bits):
    """In float32: bitsandbytes would multiply in bfloat16 on CPUs that have it, too coarse for two close losses."""
    model = load_model(str(material / "llama"), quantize=bits, dtype="float32")
    whole = load_model(str(material / "llama"), dtype="float32")
    off = 0.0
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        rounded = values_of(module.weight)
        plain = whole.get_submodule(name).weight.detach()
        off = max(off, float((rounded - plain).abs().max() / plain.abs().max()))
        with torch.no_grad():
            plain.copy_(rounded)
    assert 1e-3 < off < {"int8": 0.01, "nf4": 0.2}[bits]
    for _ in range(2):  # the first forward changes nothing
        torch.testing.assert_close(logits(model, ids_of()), logits(whole, ids_of()), rtol=1e-5, atol=1e-5)
    per_element = {"int8": 1.2, "nf4": 0.6}[bits]
    projections = [p for n, p in whole.named_parameters() if "_proj" in n]
    saved = weight_bytes(whole) - weight_bytes(model)
    assert saved >= (4 - per_element) * sum(p.numel() for p in projections)
    assert is_quantized(model)
    assert not is_quantized(whole)
    assert not is_changed(whole)


@pytest.mark.parametrize("bits", NAMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_lora_starts_at_a_quantised_model_and_engines_see_its_displaced_copy(material, name, bits):
    folder = str(material / name)
    if not known(name, bits):
        with pytest.raises(InputError, match="try --quantize nf4"):
            load_model(folder, quantize=bits)
        return
    model = load_model(folder, kind=kind_of_family(name), quantize=bits, dtype="float32")
    ids = ids_of()
    before = logits(model, ids)
    torch.manual_seed(5)
    model = get_scheme("lora").prepare(model).eval()
    torch.testing.assert_close(logits(model, ids), before)
    check_engines(model, ids)


@pytest.mark.parametrize("bits", NAMES)
@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
def test_virtual_tokens_on_a_quantised_model_are_displaced_as_in_a_copy(material, scheme, bits):
    model = load_model(str(material / "llama"), quantize=bits, dtype="float32")
    torch.manual_seed(5)
    check_engines(get_scheme(scheme).prepare(model).eval(), ids_of())


def check_engines(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Both losses of every row at ±1e-2 z of the adapter, by each engine, are those of adapters moved for good."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape))  # LoRA's B too, so that A counts
    base = [t.clone() for p in model.parameters() for t in inner_tensors(p)]

    def loss(batch):
        return logits(model, batch["input_ids"])[:, :, 7].mean(1)

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    start = [p.detach().clone() for _, p in named]
    batch, at = {"input_ids": ids}, Displacement((77,), ((1e-2,),))
    for engine in ("sequential", "dual", "lowrank"):
        optimizer = ZeroOrderOptimizer(model, lr=0.0, engine=engine)
        ours = families.both(optimizer.engine, loss, batch, at)
        assert getattr(optimizer.engine, "usable", True), optimizer.engine.why
        for found, by in zip(ours, (at, at.negated()), strict=True):
            optimizer.engine.writer.apply(by)
            with torch.no_grad():
                torch.testing.assert_close(found, loss(batch), rtol=1e-5, atol=2e-6)
                assert not torch.equal(found, ours[0]) or by is at
                for (_, p), w in zip(named, start, strict=True):
                    p.copy_(w)
    seeds = tuple(range(3, 3 + len(ids)))  # a direction per row
    engine = ZeroOrderOptimizer(model, lr=0.0, engine="lowrank", groups="batch").engine
    rows = families.both(engine, loss, batch, Displacement(seeds, ((1e-2,) * len(ids),)), (1,) * len(ids))
    assert engine.usable
    for i, seed in enumerate(seeds):
        for found, sign in zip(rows, (1, -1), strict=True):
            engine.writer.apply(Displacement((seed,), ((sign * 1e-2,),)))
            with torch.no_grad():
                torch.testing.assert_close(found[i], loss(batch)[i], rtol=1e-5, atol=2e-6)
                for (_, p), w in zip(named, start, strict=True):
                    p.copy_(w)
    after = [t for p in model.parameters() for t in inner_tensors(p)]
    assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))


@pytest.mark.parametrize("bits", NAMES)
def test_the_hash_of_a_quantised_base_is_that_of_its_bits(material, bits):
    first, again = (load_model(str(material / "mistral"), quantize=bits, dtype="float32") for _ in range(2))
    logits(first, ids_of())
    assert fingerprint(first) == fingerprint(again)
    other = load_model(str(material / "mistral"), quantize=bits, dtype="float32")
    weight = inner_tensors(other.model.layers[1].self_attn.v_proj.weight)[0]
    weight.view(-1)[:1] ^= 1
    assert fingerprint(other) != fingerprint(again)
    assert fingerprint(load_model(str(material / "mistral"), dtype="float32")) != fingerprint(again)


@pytest.mark.parametrize("bits", NAMES)
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "llama"])
def test_a_classifier_s_head_stays_whole_and_trains(material, name, bits):
    labels = ["a", "b", "c"]
    model = load_model(str(material / name), kind="classifier", labels=labels, quantize=bits, dtype="float32", seed=3)
    whole = load_model(str(material / name), kind="classifier", labels=labels, dtype="float32", seed=3)
    assert is_changed(model)
    model.config.pad_token_id = whole.config.pad_token_id = 0
    assert model.fresh_parameters == whole.fresh_parameters != set()
    adapted = get_scheme("lora").prepare(model)
    assert trainable_parameters(adapted) == trainable_parameters(get_scheme("lora").prepare(whole))
    assert logits(adapted, ids_of()).shape == (3, 3)


# Steps: those of the same model in whole weights of the values that the packed ones stand for.

STEPS = {
    "dual": {"engine": "dual"},
    "lowrank": {"engine": "lowrank", "rank": 2},
    "population": {"method": "leave-one-out", "groups": "batch", "queries": 3, "forward_tokens": 40},
    "folded population": {"method": "leave-one-out", "groups": "batch", "queries": 2, "fold_every": 2},
    "auto rate": {"engine": "lowrank", "lr": "auto", "total_steps": 10},
    "auto rate, population": {
        "method": "leave-one-out",
        "groups": "batch",
        "queries": 2,
        "lr": "auto",
        "total_steps": 10,
    },
}


def unpacked(folder: Path, bits: str) -> torch.nn.Module:
    """In float32, of the numbers that the quantised model's weights are read as."""
    packed, whole = load_model(str(folder), quantize=bits, dtype="float32"), load_model(str(folder), dtype="float32")
    for name, module in packed.named_modules():
        if not name.endswith("_proj"):
            continue
        with torch.no_grad():
            whole.get_submodule(name).weight.copy_(values_of(module.weight))
    return whole


def steps_taken(
    model: torch.nn.Module, scheme: str, options: dict
) -> tuple[list, list[torch.Tensor], list[torch.Tensor]]:
    """The records of four steps, what trains before them and after."""
    torch.manual_seed(5)
    adapted = get_scheme(scheme).prepare(model).eval()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    optimizer = ZeroOrderOptimizer(adapted, **({"lr": 1e-2, "eps": 1e-1} | options))
    records: list = []
    optimizer.watch = records.append
    labels = torch.tensor([7, 11, 13])

    def loss(batch):
        logits = adapted(input_ids=batch["input_ids"], use_cache=False).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    for _ in range(4):
        optimizer.step(loss, batch={"input_ids": ids_of(), "labels": labels})
    optimizer.flush()
    assert getattr(optimizer.engine, "usable", True), optimizer.engine.why
    return records, start, [p.detach() for p in trained]


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("scheme", ["lora", "prefix"])
@pytest.mark.parametrize("bits", NAMES)
def test_steps_over_a_packed_base_are_those_over_its_values(material, bits, scheme, options):
    """Losses, projected gradients, the rate that was found and the adapter after four steps; products differ in their last bits."""
    found, start, ours = steps_taken(
        load_model(str(material / "llama"), quantize=bits, dtype="float32"), scheme, options
    )
    expected, _, theirs = steps_taken(unpacked(material / "llama", bits), scheme, options)
    for a, b in zip(found, expected, strict=True):
        assert (a.seeds_Q, a.skipped, a.shares) == (b.seeds_Q, b.skipped, b.shares)
        assert a.losses_P == pytest.approx(b.losses_P, rel=1e-5)
        assert a.g_GQ[0] == pytest.approx(b.g_GQ[0], abs=2e-4)
        assert any(abs(g) > 2e-3 for g in a.g_GQ[0])
        assert a.lr_G == pytest.approx(b.lr_G, rel=1e-2)
    for before, value, other in zip(start, ours, theirs, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)
        assert not torch.equal(value, before)


# A run.


def flags(material: Path, name: str, **changes: object) -> list[str]:
    given = {"steps": 4, "eval_every": 2, "eps": "1e-2", "loss": "candidates"} | changes
    return tiny.flags(material / name, Path(str(given.pop("data", material / "data"))), **given)


class Stop(Listener):
    """Breaks off in the third step."""

    def advance(self, what: str, done: int, **shown: float) -> None:
        self.steps = getattr(self, "steps", 0) + (what == "train" and done)
        if self.steps == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("lora", "nf4"),
        ("prefix", "int8"),
        pytest.param("lora", "int8", marks=pytest.mark.slow),
        pytest.param("prompt", "nf4", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_on_a_quantised_base_trains_resumes_loads_scores_and_replays(material, tmp_path, scheme, bits):
    out, cut = tmp_path / "run", tmp_path / "cut"
    args = flags(material, "llama", scheme=scheme, quantize=bits)
    assert run(["train", *args, "--output", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert f"--quantize {bits}" in (out / "model" / "README.md").read_text()

    options = dict(zip((a[2:].replace("-", "_") for a in args[::2]), args[1::2], strict=True))
    with pytest.raises(KeyboardInterrupt):
        zotune.train(**options, output=str(cut), listener=Stop())
    assert run(["train", *args, "--output", str(cut), "--resume"]) == 0
    assert json.loads((cut / "result.json").read_text())["resumed_at"] == [3]
    weights = (out / "model" / "adapter_model.safetensors").read_bytes()
    assert (cut / "model" / "adapter_model.safetensors").read_bytes() == weights

    base = ["--model", str(material / "llama"), "--device", "cpu"]
    data = ["--data", str(material / "data"), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS]
    on = ["--adapter", str(out / "model"), "--quantize", bits]
    assert run(["eval", *base, *data, *on, "--output", str(tmp_path / "value.json")]) == 0
    assert json.loads((tmp_path / "value.json").read_text())["value"] == pytest.approx(result["test_after"])
    assert run(["predict", *base, *data, *on, "--output", str(tmp_path / "rows.jsonl")]) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6

    steps = ["--trajectory", str(out / "trajectory.zot")]  # which names how the base was quantised
    assert run(["replay", *base, *steps, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == weights
    assert run(["eval", *base, *data, *steps, "--output", str(tmp_path / "value.json")]) == 0
    assert json.loads((tmp_path / "value.json").read_text())["value"] == pytest.approx(result["test_after"])


@pytest.mark.parametrize(("scheme", "bits"), [("lora", "nf4"), ("prefix", "int8")])
def test_a_population_finds_its_rate_over_a_quantised_base_and_is_replayed(material, tmp_path, scheme, bits):
    more = {"method": "leave-one-out", "groups": "batch", "queries": 2, "lr": "auto", "steps": 2}
    args = flags(material, "llama", scheme=scheme, quantize=bits, **more)
    assert run(["train", *args, "--output", str(tmp_path / "run")]) == 0
    steps = ["--model", str(material / "llama"), "--trajectory", str(tmp_path / "run" / "trajectory.zot")]
    assert run(["replay", *steps, "--device", "cpu", "--output", str(tmp_path / "again")]) == 0
    ours, again = (tmp_path / name / "adapter_model.safetensors" for name in ("run/model", "again"))
    assert ours.read_bytes() == again.read_bytes()


def test_a_classifier_on_a_quantised_base_is_loaded_with_its_head(material, tmp_path):
    """The adapter's folder says the kind and the labels, and does not claim to hold quantised weights."""
    args = flags(
        material, "roberta", scheme="lora", quantize="nf4", model_kind="classifier", template="{text}", steps=2
    )
    assert run(["train", *args, "--output", str(tmp_path / "run")]) == 0
    saved = tmp_path / "run" / "model"
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    given = ["--data", str(material / "data"), "--template", "{text}", "--label-words", tiny.WORDS, "--quantize", "nf4"]
    given += ["--model", str(material / "roberta"), "--adapter", str(saved), "--device", "cpu"]
    assert run(["eval", *given, "--output", str(tmp_path / "value.json")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads((tmp_path / "value.json").read_text())["value"] == pytest.approx(result["test_after"])


@pytest.mark.parametrize("bits", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_first_order_training_goes_through_a_quantised_base(material, tmp_path, bits):
    args = flags(material, "llama", scheme="lora", quantize=bits, method="fo-adam", eps=None, steps=1, eval_every=1)
    assert run(["train", *args, "--output", str(tmp_path / bits)]) == 0


def test_a_base_that_its_checkpoint_has_quantised_serves_adapters_alone(material, tmp_path, capsys):
    load_model(str(material / "llama"), quantize="nf4", dtype="float32").save_pretrained(tmp_path / "packed")
    families.tokenizer("llama").save_pretrained(tmp_path / "packed")
    data = {"data": material / "data"}
    out = str(tmp_path / "run")
    assert run(["train", *flags(tmp_path, "packed", steps=2, scheme="lora", **data), "--output", out]) == 0
    for scheme in ("full", "head"):
        assert run(["train", *flags(tmp_path, "packed", scheme=scheme, **data), "--output", f"{out}-{scheme}"]) == 2
        assert "quantised and cannot be trained; use --scheme lora" in capsys.readouterr().err


def test_a_checkpoint_that_rounds_activations_too_is_for_back_propagation_alone(material, tmp_path, capsys):
    import transformers

    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(material / "llama", quantization_config=eight)
    model.save_pretrained(tmp_path / "eight")
    families.tokenizer("llama").save_pretrained(tmp_path / "eight")
    args = flags(tmp_path, "eight", scheme="lora", data=material / "data", steps=2)
    assert "--quantize int8" in refused(capsys, "train", *args, "--output", str(tmp_path / "run"))
    given = [
        "--data",
        str(material / "data"),
        "--template",
        tiny.TEMPLATE,
        "--label-words",
        tiny.WORDS,
        "--device",
        "cpu",
    ]
    assert run(["eval", "--model", str(tmp_path / "eight"), *given]) == 0


def refused(capsys, *words: str) -> str:
    assert run([*words]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_what_cannot_be_on_a_quantised_base_is_said_in_a_line(material, tmp_path, capsys, monkeypatch):
    out = ["--output", str(tmp_path / "run")]
    for scheme in ("full", "head", None):
        line = refused(capsys, "train", *flags(material, "llama", quantize="nf4", scheme=scheme), *out)
        assert "use --scheme lora, prefix or prompt" in line
    assert "did you mean 'int8'" in refused(
        capsys, "train", *flags(material, "llama", quantize="int3", scheme="lora"), *out
    )
    assert run(["train", *flags(material, "llama", quantize="nf4", scheme="lora", steps=2), *out]) == 0
    capsys.readouterr()
    on = ["--model", str(material / "llama"), "--adapter", str(tmp_path / "run" / "model"), "--quantize", "nf4"]
    assert "merged into whole weights" in refused(capsys, "merge", *on, "--output", str(tmp_path / "m"))
    steps = ["--model", str(material / "llama"), "--trajectory", str(tmp_path / "run" / "trajectory.zot")]
    again = ["--device", "cpu", "--output", str(tmp_path / "again")]
    assert "was nf4" in refused(capsys, "replay", *steps, *again, "--quantize", "int8")
    assert "keeps the run's dtype" in refused(capsys, "replay", *steps, *again, "--dtype", "bfloat16")
    steps[1] = str(material / "mistral")
    assert "not the one that the run started from" in refused(capsys, "replay", *steps, *again)
    families.save("llama", tmp_path / "narrow")
    narrow = flags(tmp_path, "narrow", quantize="nf4", scheme="lora", data=material / "data")
    line = refused(capsys, "train", *narrow, "--output", str(tmp_path / "n"))
    assert "q_proj is 32 wide" in line
    assert "use --quantize int8" in line
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    line = refused(
        capsys, "train", *flags(material, "llama", quantize="nf4", scheme="lora"), "--output", str(tmp_path / "x")
    )
    assert line.endswith("needs bitsandbytes; pip install 'zotune[quant]'")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", NAMES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_on_cuda_is_replayed(material, tmp_path, scheme, bits):
    out = tmp_path / "run"
    args = flags(material, "llama", scheme=scheme, quantize=bits, device="cuda", engine="dual", dtype="bfloat16")
    assert run(["train", *args, "--output", str(out)]) == 0
    steps = ["--model", str(material / "llama"), "--trajectory", str(out / "trajectory.zot"), "--device", "cuda"]
    assert run(["replay", *steps, "--output", str(tmp_path / "again")]) == 0
    weights = (out / "model" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.gpu
@pytest.mark.parametrize("bits", NAMES)
def test_engines_on_cuda_see_displaced_copies(material, bits):
    model = load_model(str(material / "llama"), quantize=bits, dtype="float32", device="cuda")
    torch.manual_seed(5)
    model = get_scheme("lora").prepare(model).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    losses = {}
    for engine in ("sequential", "dual"):
        optimizer = ZeroOrderOptimizer(copy.deepcopy(model), lr=0.0, engine=engine)
        adapted = optimizer.engine
        at, batch = Displacement((77,), ((1e-2,),)), {"input_ids": ids_of().cuda()}
        losses[engine] = torch.stack(
            families.both(adapted, lambda b: logits(model, b["input_ids"])[:, :, 7].mean(1), batch, at)
        )
    torch.testing.assert_close(losses["dual"], losses["sequential"], rtol=1e-4, atol=1e-5)
