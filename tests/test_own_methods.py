"""A rule and an estimator of one's own train, resume, replay and are captured, without a registry; and only when they are named."""

from __future__ import annotations

import copy
import json
import sys

import own_methods
import pytest
import tiny
import torch
import transformers as tf
from own_methods import TANH, cubed
from test_graphs import pretend
from torch import nn

from zotune import Method, ZeroOrderOptimizer, ZOTrainer, ZOTrainingArguments
from zotune.cli.app import run
from zotune.methods import has_eps
from zotune.record.trajectory import Record, read_file
from zotune.step import reference

METHODS = {"tanh": TANH, "cubed": cubed(2)}


def small(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def rows_of(model: nn.Module):
    return lambda batch: model(batch["x"]).square().mean(1)


def data(dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)}


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_of_ones_own_takes_the_steps_of_the_reference(name):
    method, model, state = METHODS[name], small(torch.float64), {}
    optimizer = ZeroOrderOptimizer(model, method=method, seed=3)
    weights, batch = {n: p.detach().clone() for n, p in model.named_parameters()}, data(torch.float64)
    loss = lambda at: float(torch.func.functional_call(model, at, (batch["x"],)).detach().square().mean())  # noqa: E731
    for step in range(3):
        optimizer.step(rows_of(model), batch=batch)
        eps, direction = method.eps or 1e-3, method.direction or "gaussian"
        weights = reference.take(
            weights, loss, method, step=step, lr=method.lr, eps=eps, seed=3, direction=direction, state=state
        )
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.data, weights[n], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(METHODS))
def test_its_records_and_its_saved_state_give_the_bits_again(name, dtype):
    method, trained, rebuilt, resumed = METHODS[name], small(dtype), small(dtype), small(dtype)
    first, again, half = (ZeroOrderOptimizer(m, method, seed=3, lr=1e-2) for m in (trained, rebuilt, resumed))
    for step in range(6):
        first.step(rows_of(trained), batch=data(dtype))
        last = first.last
        again.apply_record(Record(step, 0.0, 0.0, last.g_GQ[0], last.lr_G, last.decay_G, last.skipped))
        if step == 3:
            state, half = copy.deepcopy(half.state_dict()), ZeroOrderOptimizer(resumed, method, lr=1e-2, seed=9)
            half.load_state_dict(state)
        half.step(rows_of(resumed), batch=data(dtype))
    for p, q, r, start in zip(*(m.parameters() for m in (trained, rebuilt, resumed, small(dtype))), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
        assert not torch.equal(p, start)


def test_a_rule_of_coefficients_is_part_of_a_captured_step_to_the_host_s_bits(monkeypatch):
    pretend(monkeypatch)
    host, captured = small(), small()
    plain, second = (ZeroOrderOptimizer(m, TANH, seed=3, lr=1e-2) for m in (host, captured))
    plain.captured.wanted = False
    losses = rows_of(captured)  # graphs are found by it
    for _ in range(4):
        plain.step(rows_of(host), batch=data())
        second.step(losses, batch=data())
    second.land()
    assert second.captured.graphs is not None
    assert second.captured.graphs.usable
    assert repr(second.last) == repr(plain.last)
    assert all(torch.equal(p, q) for p, q in zip(host.parameters(), captured.parameters(), strict=True))


def test_the_trainer_takes_one(tmp_path):
    model = tiny.causal_model()
    before = copy.deepcopy(model.state_dict())
    args = ZOTrainingArguments(
        output_dir=str(tmp_path), method=TANH, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [i % 60 + 1, 2, 3, 4], "labels": [-100, 2, 3, 4]} for i in range(16)]
    collate = lambda batch: {k: torch.tensor([row[k] for row in batch]) for k in batch[0]}  # noqa: E731
    trainer = ZOTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.zo_optimizer.method is TANH
    assert trainer.zo_optimizer.direction == "rademacher"
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return tiny.save_model(folder / "model"), tiny.save_data(folder / "data")


@pytest.mark.parametrize("name", ["own_methods:TANH", "own_methods:cubed"])
def test_the_command_line_trains_and_replays_one_that_is_named_again(made, tmp_path, capsys, name):
    out = tmp_path / "run"
    assert run(["train", *tiny.flags(*made), "--method", name, "--output", str(out)]) == 0, capsys.readouterr().err
    header = read_file(out / "trajectory.zot").header
    assert header.method == name
    assert header.direction == ("rademacher" if name.endswith("TANH") else "gaussian")
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == name
    replay = ["replay", "--model", str(made[0]), "--trajectory", str(out / "trajectory.zot"), "--until", "last"]
    capsys.readouterr()
    assert run([*replay, "--output", str(tmp_path / "no")]) == 2
    assert f"--method {name}" in capsys.readouterr().err
    assert run([*replay, "--method", name, "--output", str(tmp_path / "again")]) == 0, capsys.readouterr().err
    assert run([*replay, "--method", "own_methods:other", "--output", str(tmp_path / "no")]) == 2
    first, second = (
        tf.AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (out / "model", tmp_path / "again")
    )
    if result["chosen_step"] == 6:
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_trajectory_never_has_a_module_imported(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert run(["train", *tiny.flags(*made), "--method", "own_methods:TANH", "--output", str(out)]) == 0
    monkeypatch.delitem(sys.modules, "own_methods")
    for command in (["replay", "--output", str(tmp_path / "again")], ["eval", "--data", str(made[1]), "--template",
                    tiny.TEMPLATE, "--label-words", tiny.WORDS]):  # fmt: skip
        assert run([*command, "--model", str(made[0]), "--trajectory", str(out / "trajectory.zot")]) == 2
        assert "own_methods" not in sys.modules
    monkeypatch.setitem(sys.modules, "own_methods", own_methods)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_methods:other", "has no attribute 'other'"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("own_methods:torch", "it has to be a zotune.Method"),
        ("own_methods:Cubed", "gives a Cubed"),
    ],
)
def test_what_is_no_method_is_one_line(made, tmp_path, capsys, name, said):
    assert run(["train", *tiny.flags(*made), "--method", name, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_options_beside_an_object_are_refused():
    for options in ({"queries": 2}, {"estimator": "one-sided"}):
        with pytest.raises(ValueError, match="method is an object that has its own"):
            ZeroOrderOptimizer(small(), Method(), **options)


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    """An installed package that brings the method `tanh` by an entry point, as `pip install` leaves one."""
    found = tmp_path / "site" / "zotune_tanh-1.2.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: zotune-tanh\nVersion: 1.2\n")
    (found / "entry_points.txt").write_text("[zotune.methods]\ntanh = own_methods:TANH\nzo-sgd = own_methods:cubed\n")
    monkeypatch.syspath_prepend(str(found.parent))
    monkeypatch.delitem(sys.modules, "own_methods")
    yield "tanh"
    sys.modules["own_methods"] = own_methods


def test_an_installed_package_brings_methods_by_name_and_takes_none_of_zotune_s(plugin, made, tmp_path, capsys):
    assert run(["list", "methods"]) == 0
    said = capsys.readouterr().out
    assert "own_methods:TANH, brought by zotune-tanh 1.2" in said
    assert "own_methods:cubed" not in said
    assert "own_methods" not in sys.modules  # a list imports nothing
    out = tmp_path / "run"
    assert run(["train", *tiny.flags(*made), "--method", "tanh", "--output", str(out)]) == 0, capsys.readouterr().err
    header = read_file(out / "trajectory.zot").header
    assert (header.method, header.direction) == ("tanh", "rademacher")
    assert run(["train", *tiny.flags(*made), "--method", "tahn", "--output", str(tmp_path / "no")]) == 2
    assert "did you mean 'tanh'?" in capsys.readouterr().err


def test_a_trajectory_imports_no_installed_package_s_method_either(plugin, made, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(["train", *tiny.flags(*made), "--method", "tanh", "--output", str(out)]) == 0, capsys.readouterr().err
    del sys.modules["own_methods"]
    replay = ["replay", "--model", str(made[0]), "--trajectory", str(out / "trajectory.zot")]
    assert run([*replay, "--output", str(tmp_path / "again")]) == 2
    assert "--method tanh" in capsys.readouterr().err
    assert "own_methods" not in sys.modules
    assert run([*replay, "--method", "tanh", "--output", str(tmp_path / "again")]) == 0, capsys.readouterr().err
    first, second = (
        next((folder).glob("*.safetensors")).read_bytes() for folder in (out / "model", tmp_path / "again")
    )
    assert first == second


def test_a_record_s_method_is_not_imported_to_see_whether_it_has_eps(monkeypatch):
    monkeypatch.delitem(sys.modules, "own_methods")
    assert has_eps("own_methods:TANH", recorded=True)
    assert "own_methods" not in sys.modules
    assert has_eps("own_methods:TANH")
    assert not has_eps("fo-adam", recorded=True)
    sys.modules["own_methods"] = own_methods
