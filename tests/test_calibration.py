"""Wanda's masks: scores against a straightforward reference, through resumption and replay."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from test_enhancements import EPS, LR, SEED, assert_same, build, loss_of, optimizer_of, two_sided, z_of
from torch import nn
from torch.utils.data import TensorDataset

from zotune import ZeroOrderOptimizer, ZOTrainer, noise
from zotune.cli.app import run
from zotune.directions.calibration import NormsFolder, measure
from zotune.errors import InputError
from zotune.record.trajectory import Record


def inputs_by_hook(model: nn.Module, run_it) -> dict[str, torch.Tensor]:
    """The weights of linear maps within layers, by name, beside all that went into them: (N, I)."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdecimal() for part in name.split(".")):
            keep = seen.setdefault(f"{name}.weight", [])
            handles.append(
                module.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0].flatten(0, -2)))
            )
    with torch.no_grad():
        run_it()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def wanda_by_hand(model: nn.Module, inputs: dict[str, torch.Tensor], sparsity: float, scope: str = "layer") -> dict:
    """name → kept, of a model whose GPT-2 weights lie (I, O) and all others (O, I)."""
    scores = {}
    for name, x_NI in inputs.items():
        w = model.get_parameter(name).detach()
        transposed = isinstance(model, tf.GPT2LMHeadModel)
        scores[name] = (w.t() if transposed else w).abs() * x_NI.norm(dim=0).to(w.dtype)
    kept = {}
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort().values
    threshold = threshold[int(sparsity * len(threshold))]
    for name, score_OI in scores.items():
        if scope == "global":
            keep = score_OI >= threshold
        else:
            order = score_OI.argsort(dim=1, stable=True)
            keep = torch.ones_like(score_OI, dtype=torch.bool)
            for o in range(keep.shape[0]):
                keep[o, order[o, : int(sparsity * keep.shape[1])]] = False
        kept[name] = keep.t() if isinstance(model, tf.GPT2LMHeadModel) else keep
    return {n: kept.get(n, torch.ones_like(p, dtype=torch.bool)) for n, p in model.named_parameters()}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_step_under_a_mask_of_wanda_is_its_formula(name, scope):
    model, hand = build(name), build(name)
    optimizer = optimizer_of(model, sparsity=0.6, mask="wanda", sparsity_scope=scope, mask_refresh=2)
    for step in range(3):
        if step % 2 == 0:
            kept = wanda_by_hand(hand, inputs_by_hook(hand, lambda: loss_of(hand)), 0.6, scope)
        optimizer.step(lambda: loss_of(model))
        z = {n: z_of(n, p, noise.step_seed(SEED, step)) * kept[n] for n, p in hand.named_parameters()}
        g = two_sided(hand, z)
        with torch.no_grad():
            for n, p in hand.named_parameters():
                p -= LR * g * z[n]
    assert_same(model, hand)
    assert optimizer.forward_passes == 3 * 2 + 2  # two masks, each of its step's own batch
    masked = [n for n, keep in kept.items() if not keep.all()]
    assert masked
    assert all(".0." in n or ".1." in n or ".2." in n for n in masked)
    left_out = sum(int((~kept[n]).sum()) for n in masked)
    count = sum(kept[n].numel() for n in masked)
    assert left_out / count == pytest.approx(0.6, abs=0.03 if scope == "layer" else 1e-3)


def test_rows_of_data_weigh_where_magnitude_would_not():
    model = build("llama")
    ours = optimizer_of(model, sparsity=0.5, mask="wanda")
    ours.step(lambda: loss_of(model))
    other = build("llama")
    theirs = optimizer_of(other, sparsity=0.5, mask="magnitude")
    theirs.step(lambda: loss_of(other))
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = ours.state[model.get_parameter(name)]["kept"], theirs.state[other.get_parameter(name)]["kept"]
    assert (a != b).any()
    assert ours.state[model.get_parameter("model.embed_tokens.weight")]["kept"] is None


def test_norms_add_up_over_calls_and_names_tell_how_a_weight_lies():
    torch.manual_seed(0)
    linear, conv = nn.Linear(4, 4, bias=False).double(), tf.pytorch_utils.Conv1D(4, 4).double()
    a_NI, b_NI = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    norms = measure(
        lambda: [m(x) for m in (linear, conv) for x in (a_NI, b_NI)], {"l": linear.weight, "c": conv.weight}
    )
    expected = torch.cat([a_NI, b_NI.flatten(0, 1)]).norm(dim=0).float()
    assert norms["l"].shape == (1, 4)
    assert norms["c"].shape == (4, 1)
    torch.testing.assert_close(norms["l"].view(-1), expected)
    torch.testing.assert_close(norms["c"].view(-1), expected)
    with pytest.raises(InputError, match="not finite"):
        measure(lambda: linear(a_NI * float("nan")), {"l": linear.weight})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("zo-sgd", {"mask_refresh": 2}),
        ("zo-adam", {"blocks": "transformer", "sparsity_scope": "global"}),
        ("zo-sgd-mmt", {"mask_refresh": 1, "queries": 2}),
        ("forward-grad", {}),
    ],
)
def test_masks_of_wanda_compose_resume_and_replay_to_the_bit(method, options):
    options = {"sparsity": 0.5, "mask": "wanda"} | options
    whole, half, again = (build(dtype=torch.float32) for _ in range(3))
    one = optimizer_of(whole, method, **options)
    replayed = optimizer_of(again, method, **options)
    replayed.norms = one.norms
    for _ in range(5):
        one.step(lambda: loss_of(whole))
        last = one.last
        replayed.apply_record(
            Record(last.step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped, choice=last.choice)
        )
    first = optimizer_of(half, method, **options)
    for _ in range(3):
        first.step(lambda: loss_of(half))
    second = optimizer_of(half, method, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.step(lambda: loss_of(half))
    for p, q, r in zip(whole.parameters(), half.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    bare = optimizer_of(build(dtype=torch.float32), method, **options)
    with pytest.raises(ValueError, match="needs the input norms"):
        bare.apply_record(Record(0, 0.0, 0.0, (0.0,) * len(one.last.g_GQ[0]), (LR,), (0.0,)))


def test_what_has_no_linear_map_to_score_is_refused():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no trained parameter is the weight of a linear map"):
        optimizer_of(model, sparsity=0.5, mask="wanda").step(lambda: model(torch.ones(1, 3)).sum())
    layers = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(layers[0].weight)
    with pytest.raises(ValueError, match="all zero"):
        optimizer_of(layers, sparsity=0.5, mask="wanda").step(lambda: layers(torch.ones(1, 3)).sum())


def test_the_trainer_calibrates_on_training_rows(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 3))

        def forward(self, x=None):
            return {"loss": self.layers(x).square().mean()}

    torch.manual_seed(0)
    rows, model = torch.randn(20, 4), Model()
    before = copy.deepcopy(model)
    trainer = ZOTrainer(
        model=model, train_dataset=TensorDataset(rows), data_collator=lambda some: {"x": torch.stack([r for (r,) in some])},
        args=tf.TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True),
        method="zo-sgd", eps=EPS, method_options={"sparsity": 0.5, "mask": "wanda"}, calibration_rows=12,
    )  # fmt: skip
    trainer.train()
    optimizer = trainer.zo_optimizer
    torch.testing.assert_close(optimizer.norms[0]["layers.0.weight"], rows[:12].norm(dim=0)[None])
    assert optimizer.forward_passes == 2 * 2 + 2
    weight = model.layers[0].weight
    score = before.layers[0].weight.detach().abs() * rows[:12].norm(dim=0)
    kept = optimizer.state[weight]["kept"].view(3, 4)
    assert torch.equal(kept, score >= score.sort(dim=1).values[:, 2:3])
    assert torch.equal(weight[~kept], before.layers[0].weight[~kept])


def test_norms_on_disk_are_checked(tmp_path):
    folder = NormsFolder(tmp_path / "calibration")
    folder[40] = {"a": torch.arange(5.0)[None]}
    assert torch.equal(NormsFolder(tmp_path / "calibration")[40]["a"], torch.arange(5.0)[None])
    assert list(folder) == [40]
    file = tmp_path / "calibration" / "40.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="check sum"):
        folder[40]
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        folder[40]
    with pytest.raises(InputError, match="copy the folder"):
        folder[41]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return tiny.save_model(folder / "model"), tiny.save_data(folder / "data")


def test_a_run_of_the_command_line_replays_from_its_folder(material, tmp_path, capsys):
    flags = tiny.flags(*material, sparsity=0.5, mask="wanda", mask_refresh=4, calibration_rows=10)
    done = tmp_path / "run"
    assert run(["train", *flags, "--output", str(done)]) == 0
    assert sorted(p.name for p in (done / "calibration").iterdir()) == ["0.safetensors", "4.safetensors"]
    replay = ["replay", "--model", str(material[0]), "--device", "cpu", "--trajectory", str(done / "trajectory.zot")]
    assert run([*replay, "--output", str(tmp_path / "again")]) == 0
    assert (done / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    shutil.rmtree(done / "calibration")
    capsys.readouterr()
    assert run([*replay, "--output", str(tmp_path / "more")]) == 2
    assert "copy the folder calibration/" in capsys.readouterr().err


def test_wanda_is_refused_where_a_scheme_trains_no_linear_map_of_the_model(material, tmp_path, capsys):
    for changes, said in (
        ({"scheme": "lora", "mask": "wanda", "sparsity": 0.5}, "--mask: mask wanda scores"),
        ({"mask": "random", "sparsity": 0.5, "calibration_rows": 4}, "--calibration-rows: "),
        ({"mask": "wanda"}, "means nothing without sparsity"),
    ):
        assert run(["train", *tiny.flags(*material, **changes), "--output", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_step_of_one_sided_estimates_takes_the_mask_too():
    model, before = build(dtype=torch.float32), build(dtype=torch.float32)
    optimizer = ZeroOrderOptimizer(model, "zo-sgd", lr=1e-2, sparsity=0.9, mask="wanda", estimator="one-sided")
    optimizer.step(lambda: loss_of(model))
    for (_, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        kept = optimizer.state[p]["kept"]
        if kept is not None:
            assert torch.equal(p[~kept.view(p.shape)], q[~kept.view(p.shape)])
            assert not torch.equal(p, q)
