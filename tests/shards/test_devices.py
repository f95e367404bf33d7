"""A model whose layers `device_map` has put on several devices, of which there is one here."""

from __future__ import annotations

import pytest
import shards
import tiny
import torch
import transformers as tf
from torch import nn

import zotune
from zotune.errors import InputError, OptionError
from zotune.methods import make_method
from zotune.step.choices import Choices
from zotune.step.choosing import engines_over, reason
from zotune.step.shards import Shards


@pytest.fixture
def folder(tmp_path):
    return tiny.save_model(tmp_path / "model", tie=False)


def placed(folder, **options) -> nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = zotune.ZeroOrderOptimizer(model, lr=1e-2, seed=5)
    for step in range(2):
        optimizer.step(lambda batch: shards.row_losses(model, batch), batch=shards.batch_of(step))
    return shards.whole(model)


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}], ids=str)
def test_device_map_changes_no_bit(folder, where):
    """Its hooks move what goes into a module, and read no weight."""
    assert shards.apart(trained(placed(folder, device_map=where)), trained(placed(folder))) == 0


def test_what_is_kept_on_disk_is_refused_in_a_line(folder, tmp_path):
    names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where = names | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = placed(folder, device_map=where, offload_folder=str(tmp_path / "offload"))
    with pytest.raises(ValueError, match=r"parameter 'model\.layers\.1\..*' is on the meta device") as error:
        zotune.ZeroOrderOptimizer(model)
    assert "\n" not in str(error.value)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith("model.layers.1."))
    before = shards.whole(model.model.layers[0])
    trained_part = trained_of(model)
    assert shards.apart(trained_part, before) > 0  # the rest can be trained beside it


def trained_of(model: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = zotune.ZeroOrderOptimizer(model, lr=1e-2, seed=5)
    optimizer.step(lambda batch: shards.row_losses(model, batch), batch=shards.batch_of(0))
    return shards.whole(model.model.layers[0])


def engine_of(**options):
    """Over parameters of two devices: a CPU, and one without memory."""
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4, device="meta"))]
    choices = Choices(make_method("zo-sgd"), **options)
    groups = [{"params": params, "names": ["a", "b"]}]
    engine, _ = engines_over(groups, choices, "gaussian", None, Shards([], None))
    return engine, reason(engine, choices)


def test_parameters_of_several_devices_are_displaced_each_on_its_own():
    assert engine_of()[1] == "sequential: the model's weights lie over several devices"


@pytest.mark.parametrize("options", [{"engine": "dual"}, {"groups": "batch"}, {"engine": "lowrank"}], ids=str)
def test_engines_that_draw_many_at_once_want_one_device(options):
    with pytest.raises(
        OptionError, match="not where a model's weights lie on several devices; use engine='sequential'"
    ):
        engine_of(**options)


def test_the_trainer_says_whose_work_that_is(monkeypatch, folder, tmp_path):
    monkeypatch.setattr("zotune.trainer.refusals.is_laid_out", lambda param: True)
    with pytest.raises(InputError, match="its weights lie over several processes"):
        zotune.ZOTrainer(model=placed(folder), args=zotune.ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
