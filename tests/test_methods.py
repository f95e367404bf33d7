"""The named methods on real architectures: what they cost, forward-mode and back-propagation against autograd, and their runs."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from zotune import InputError, ZeroOrderOptimizer, ZOTrainer, ZOTrainingArguments, noise
from zotune.cli.app import run
from zotune.methods import METHODS
from zotune.models.schemes import get_scheme
from zotune.noise import reference
from zotune.record.trajectory import read_file

V, H = 96, 32
SIZES = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
MODELS = {
    "llama": tf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": tf.GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64),
    "opt": tf.OPTConfig(
        vocab_size=V, hidden_size=H, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=H,
    ),
    "gemma2": tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "bert": tf.BertConfig(**SIZES),
}  # fmt: skip
FORWARDS = {
    ("zo-sgd", 1): 2, ("zo-sgd", 3): 6, ("zo-sgd-mmt", 2): 4, ("zo-sgd-sign", 1): 2, ("zo-sgd-cons", 1): 5,
    ("zo-sgd-cons", 2): 7, ("zo-adam", 1): 2, ("forward-grad", 1): 1, ("forward-grad", 3): 3, ("fo-sgd", 1): 1,
    ("fo-adam", 1): 1, ("meazo", 2): 4, ("copes", 4): 4, ("lozo-m", 1): 2, ("zo-muon", 4): 5, ("subzero-plus", 9): 10,
}  # fmt: skip


def build(name: str, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    auto = tf.AutoModelForMaskedLM if name == "bert" else tf.AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(MODELS[name])).to(dtype).eval()


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24, device=next(model.parameters()).device).view(3, 8) * 5 % (V - 4) + 2
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradient(model: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss_of(model), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def z_of(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    return {
        n: reference.normals(torch.arange(p.numel()), seed, noise.parameter_id(n)).double().view(p.shape)
        for n, p in model.named_parameters()
    }


@pytest.mark.parametrize(("method", "queries"), list(FORWARDS))
def test_a_step_costs_the_forwards_of_the_table(method, queries):
    model, calls = build("gpt2", torch.float32), []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = ZeroOrderOptimizer(model, method, lr=1e-4, queries=queries)
    optimizer.step(lambda: loss_of(model))
    assert len(calls) == optimizer.forward_passes == optimizer.forwards_a_step == FORWARDS[method, queries]
    optimizer.step(lambda: loss_of(model))
    assert optimizer.forward_passes == 2 * FORWARDS[method, queries]


@pytest.mark.parametrize("name", list(MODELS))
def test_forward_mode_gives_the_directional_derivative_and_moves_along_z(name):
    model, start = build(name), build(name)
    optimizer = ZeroOrderOptimizer(model, "forward-grad", lr=1e-3, queries=2, seed=3)
    optimizer.step(lambda: loss_of(model))
    true, expected = gradient(start), {n: p.detach().clone() for n, p in start.named_parameters()}
    for q in range(2):
        z = z_of(start, noise.step_seed(3, 0, q))
        g = sum(float((true[n] * z[n]).sum()) for n in true)
        assert optimizer.last.g_GQ[0][q] == pytest.approx(g, rel=1e-6, abs=3e-6)  # some norms compute in float32 always
        for n in expected:
            expected[n] -= 1e-3 * g * z[n] / 2
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.data, expected[n], rtol=0, atol=3e-8)
    assert optimizer.last.loss == pytest.approx(float(loss_of(start).detach()), rel=1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("name", list(MODELS))
def test_forward_mode_holds_in_16_bits(name, scheme, dtype, device):
    """Beside float64 gradients of the same 16-bit weights; a derivative is about as large as the gradient is long."""
    narrow = get_scheme(scheme).prepare(build(name, torch.float32))
    for param_name, param in narrow.named_parameters():
        if "lora_B" in param_name:
            nn.init.normal_(param, std=0.05)
    narrow = narrow.to(dtype)
    exact = copy.deepcopy(narrow).double()
    trained = [(n, p) for n, p in exact.named_parameters() if p.requires_grad]
    true = torch.autograd.grad(loss_of(exact), [p for _, p in trained])
    optimizer = ZeroOrderOptimizer(narrow.to(device), "forward-grad", lr=0.0, seed=3)
    optimizer.step(lambda: loss_of(narrow))
    z = z_of(exact, noise.step_seed(3, 0, 0))
    g = sum(float((slope * z[n]).sum()) for (n, _), slope in zip(trained, true, strict=True))
    length = sum(float(slope.square().sum()) for slope in true) ** 0.5
    assert optimizer.last.g_GQ[0][0] == pytest.approx(g, abs=length * (0.2 if dtype == torch.bfloat16 else 0.03))


def test_forward_mode_is_the_limit_of_two_sided_differences():
    exact, close = build("gpt2"), build("gpt2")
    first = ZeroOrderOptimizer(exact, "forward-grad", lr=0.0, seed=4)
    second = ZeroOrderOptimizer(close, "zo-sgd", lr=0.0, eps=1e-5, seed=4)
    first.step(lambda: loss_of(exact))
    second.step(lambda: loss_of(close))
    assert first.last.g_GQ[0][0] == pytest.approx(second.last.g_GQ[0][0], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "dtype"),  # Adam divides what float32 leaves of a zero gradient by itself
    [("fo-sgd", torch.float64), ("fo-sgd", torch.float32), ("fo-adam", torch.float64)],
)
def test_first_order_is_torchs_own(method, dtype):
    ours, theirs = build("gpt2", dtype), build("gpt2", dtype)
    first = ZeroOrderOptimizer(ours, method, lr=1e-3, weight_decay=0.1)
    kind = torch.optim.AdamW if method == "fo-adam" else torch.optim.SGD
    second = kind(theirs.parameters(), lr=1e-3, weight_decay=0.1 if method == "fo-adam" else 0.0)
    for _ in range(4):
        first.step(lambda: loss_of(ours))
        second.zero_grad()
        loss_of(theirs).backward()
        second.step()
        if method == "fo-sgd":
            break  # torch's decay of SGD goes through the gradient
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        decayed = 1e-3 * 0.1 * build("gpt2", dtype).get_parameter(name) if method == "fo-sgd" else 0.0
        torch.testing.assert_close(p, q - decayed, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-8)
    assert all(p.grad is None and p.requires_grad for p in ours.parameters())


def test_a_closure_without_a_gradient_is_refused_where_one_is_needed():
    model = build("gpt2")
    for closure in (lambda: 3.0, lambda: loss_of(model).detach()):
        with pytest.raises(InputError, match="returns a tensor with a gradient"):
            ZeroOrderOptimizer(model, "fo-sgd").step(closure)
    with pytest.raises(InputError, match="must return a tensor"):
        ZeroOrderOptimizer(model, "forward-grad").step(lambda: 3.0)
    for method in ("fo-sgd", "forward-grad"):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = ZeroOrderOptimizer(model, method, lr=1.0)
        optimizer.step(lambda: loss_of(model) * float("nan"))
        assert optimizer.skipped_steps == 1
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", ["fo-adam", "forward-grad", "zo-adam"])
def test_the_trainer_steps_by_any_method(method, tmp_path):
    rows = [{"input_ids": [i % 60 + 1, 2, 3, 4], "labels": [-100, 2, 3, 4]} for i in range(16)]
    args = ZOTrainingArguments(
        output_dir=str(tmp_path), method=method, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3,
        gradient_accumulation_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = build("llama", torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    collate = lambda batch: {k: torch.tensor([row[k] for row in batch]) for k in batch[0]}  # noqa: E731
    trainer = ZOTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.zo_optimizer.steps == 4
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    return tiny.save_model(folder / "model"), tiny.save_data(folder / "data")


@pytest.mark.parametrize(
    ("extra", "forwards"),
    [
        (["--method", "fo-adam", "--lr", "1e-3"], 6),
        (["--method", "zo-sgd-cons"], 30),
        (["--method", "forward-grad", "--scheme", "lora"], 6),
        (["--method", "zo-sgd-sign", "--sign-mode", "scalar"], 12),
        (["--method", "grzo"], 12),
        (["--method", "zo-muon", "--rank", "4", "--queries", "2"], 18),
        (["--method", "zo-act"], 13),
        (["--method", "aim-zo", "--queries", "3"], 24),
    ],
)
def test_a_run_by_each_kind_of_method(made, tmp_path, capsys, extra, forwards):
    out = tmp_path / "run"
    assert run(["train", *tiny.flags(*made), *extra, "--output", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["forward_passes"], result["method"]) == (forwards, extra[1])
    assert (out / "trajectory.zot").exists() == (not extra[1].startswith("fo-"))
    if extra[1].startswith("fo-"):
        assert result["state_bytes"] == 8 * result["trainable_parameters"]
    else:
        trajectory = read_file(out / "trajectory.zot")
        assert len(trajectory.records) == 6
        if extra[1] == "zo-sgd-cons":
            assert {record.choice for record in trajectory.records} <= {0, 1, 2}
            assert any(record.choice for record in trajectory.records)
        if "--sign-mode" in extra:
            assert trajectory.header.method_options["sign_mode"] == "scalar"
    assert run(["train", *tiny.flags(*made), *extra, "--output", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "forward passes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_of_adam_resumes_to_the_bits_of_a_whole_one(made, tmp_path):
    """16-bit weights, float32 moments."""
    flags = tiny.flags(*made, steps=40, eval_every=4, method="zo-adam", dtype="bfloat16", lr="1e-3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(["train", *flags, "--output", str(whole)]) == 0
    command = [sys.executable, "-m", "zotune", "train", *flags, "--output", str(cut), "--resume"]
    slow = {"ZOTUNE_NOISE_BACKEND": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=os.environ | slow, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not any((c / "trainer_state.json").exists() for c in cut.glob("checkpoint-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < 90
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(["train", *flags, "--output", str(cut), "--resume"]) == 0
    assert json.loads((cut / "result.json").read_text())["resumed_at"]
    for name in ("model/model.safetensors", "trajectory.zot"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        ["--method", "zo-adam", "--dtype", "bfloat16", "--lr-schedule", "linear"],
        ["--method", "zo-adam", "--beta1", "0.8", "--beta2", "0.9", "--adam-eps", "1e-4", "--state-dtype", "bfloat16"],
        ["--method", "zo-sgd-cons", "--queries", "2", "--g-clip", "3"],
        ["--method", "zo-sgd-mmt", "--blocks", "transformer", "--block-update", "jacobi", "--momentum", "0.5"],
        ["--sparsity", "0.5", "--mask", "magnitude", "--mask-refresh", "2"],
        ["--method", "forward-grad", "--sparsity", "0.5", "--sparsity-scope", "global"],
        ["--method", "meazo", "--queries", "2", "--dtype", "bfloat16"],
        ["--method", "copes", "--queries", "4", "--dtype", "bfloat16"],
        ["--method", "grzo", "--lr-schedule", "linear"],
        ["--method", "lozo-m", "--dtype", "bfloat16"],
        ["--method", "subzero-plus", "--queries", "3", "--rank", "4"],
    ],
)
def test_a_runs_file_and_its_base_model_give_its_weights(made, tmp_path, extra):
    out = tmp_path / "run"
    assert run(["train", *tiny.flags(*made, eval_every=6), *extra, "--output", str(out)]) == 0
    header, records = (trajectory := read_file(out / "trajectory.zot")).header, trajectory.records
    model = tf.AutoModelForCausalLM.from_pretrained(made[0], dtype=getattr(torch, header.dtype)).eval()
    kept = {"direction": header.direction, "seed": header.seed, "engine": header.engine}
    optimizer = ZeroOrderOptimizer(model, header.method, **kept, **header.method_options)
    for record in records:
        optimizer.apply_record(record)
    trained = tf.AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert trajectory.chosen_step == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--method", "zo-sgd", "--momentum", "0.5"], "no option 'momentum'"),
        (["--method", "zo-sgd-mmt", "--beta1", "0.5"], "no option 'beta1'"),
        (["--method", "zo-adam", "--momentum", "0.5"], "no option 'momentum'"),
        (["--method", "zo-adam", "--beta2", "1"], "--beta2"),
        (["--method", "fo-adam", "--adam-eps", "0"], "--adam-eps"),
        (["--method", "fo-adam", "--state-dtype", "float8"], "did you mean 'float32'"),
        (["--method", "fo-sgd", "--queries", "2"], "no option 'queries'"),
        (["--method", "fo-sgd", "--estimator", "one-sided"], "no option 'estimator'"),
        (["--method", "fo-adam", "--sparsity", "0.5"], "no direction"),
        (["--method", "zo-sgd-cons", "--weight-decay", "0.1"], "weight_decay"),
        (["--method", "zo-sgd-cons", "--blocks", "linear"], "compares one move"),
        (["--method", "forward-grad", "--engine", "lowrank"], "engine"),
        (["--mask", "random"], "means nothing without sparsity"),
        (["--hybrid", "0.5"], "needs fo_lr"),
        (["--hybrid", "0.5", "--fo-lr", "1e-3", "--scheme", "head"], "use --scheme full or lora"),
        (["--blocks", "attention-mlp", "--scheme", "prefix"], "use --scheme full or lora"),
        (["--sparsity", "1.0"], "--sparsity"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(made, tmp_path, capsys, extra, said):
    assert run(["train", *tiny.flags(*made), *extra, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_the_list_tells_what_each_costs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["list", "methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # a line may be folded
    for name, preset in METHODS.items():
        assert name in shown
        assert preset.forwards in shown
        assert preset.paper in shown
    assert "--momentum 0.9" in shown
    assert "--beta2 0.999; --adam-eps 1e-08; --state-dtype float32" in shown
    assert METHODS["zo-adam"].state == "2 × trainable"


def test_a_dict_of_named_parameters_is_the_model_s_own_and_a_bare_group_is_refused():
    def after(given) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = ZeroOrderOptimizer(given(model), lr=0.1, seed=1)
        optimizer.step(lambda: model(torch.ones(1, 3)).sum())
        return [p.detach() for p in model.parameters()]

    whole = after(lambda model: model)
    for given in (
        lambda model: dict(model.named_parameters()),
        lambda model: [{"params": dict(model.named_parameters())}],
    ):
        assert all(torch.equal(p, q) for p, q in zip(whole, after(given), strict=True))
    with pytest.raises(ValueError, match="give a list of groups"):
        ZeroOrderOptimizer({"params": list(nn.Linear(3, 2).parameters())})
