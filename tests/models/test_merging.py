"""A merged model computes what base and adapter do, from the files that were written; else nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import peft
import pytest
import tiny
import torch
import transformers as tf

from zotune.cli.app import run
from zotune.models import merging
from zotune.models.adapters import save
from zotune.models.kinds import kind_of

IDS = torch.tensor([[3, 9, 4, 7, 22]])
TIED: dict[str, dict[str, Any]] = {
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "both, tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "an embedding of its own": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "an embedding of its own, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "neither": {"target_modules": ["q_proj", "v_proj"]},
}


@torch.no_grad()
def moved(adapted: Any, by: float = 0.05) -> Any:
    torch.manual_seed(1)
    for param in adapted.parameters():
        if param.requires_grad:
            param.add_(torch.randn_like(param) * by)
    return adapted.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def merge(base: Path, adapter: Path, out: Path, *flags: str) -> int:
    given = ["--model", str(base), "--adapter", str(adapter), "--output", str(out), "--device", "cpu"]
    return run(["merge", *given, *flags])


@pytest.mark.parametrize("what", TIED)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_tied_embedding_and_head_is_merged_right(tmp_path, what):
    base = tiny.save_model(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    adapted = moved(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **TIED[what])))
    wanted = logits(adapted)
    assert (wanted - before).abs().max() > 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged") == 0
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-5)
    ends = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == (what in ("an embedding of its own, tied", "dora", "neither"))


@pytest.mark.parametrize("kind", ["", "classifier"])
@pytest.mark.parametrize("name", [*families.CAUSAL, *families.MASKED])
@pytest.mark.filterwarnings("ignore")
def test_every_family_s_adapters_merge(tmp_path, name, kind):
    """On all linear maps, the head too where PEFT takes it; in its own kind."""
    words = families.tokenizer(name)
    model: Any = families.build(name, kind, vocabulary=len(words) + 4)
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    task = {"classifier": "SEQ_CLS", "causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION"}[kind_of(model)]
    adapted = moved(peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules="all-linear")))
    wanted = logits(adapted)
    save(adapted, words, tmp_path / "adapter")
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
    found = type(families.build(name, kind)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(found), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("by", [0.0, 1e-3, 0.3])
def test_rounding_to_the_dtype_is_no_wrong_merge(tmp_path, dtype, by):
    base = tiny.save_model(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    moved(peft.get_peft_model(tiny.causal_model(), config), by).save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged", "--dtype", dtype) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_computes_something_else_is_not_written(tmp_path, capsys, monkeypatch, dtype):
    """As of an embedding and a head that stay one tensor."""
    base = tiny.save_model(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "lm_head"])
    moved(peft.get_peft_model(tiny.causal_model(), config), 0.3).save_pretrained(tmp_path / "adapter")
    merged = merging.merged

    def wrong(adapted: Any, where: str) -> Any:
        whole = merged(adapted, where)
        with torch.no_grad():
            whole.get_output_embeddings().weight.copy_(whole.get_input_embeddings().weight)
        return whole

    monkeypatch.setattr("zotune.cli.merge.merged", wrong)
    assert merge(base, tmp_path / "adapter", tmp_path / "merged", "--dtype", dtype) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "off those with the adapter on it" in line
    assert "nothing is written" in line
    assert not list(tmp_path.glob("*merged*"))


def test_a_merge_that_leaves_the_dtype_s_range_is_not_written(tmp_path, capsys):
    base = tiny.save_model(tmp_path / "base")
    adapted = moved(peft.get_peft_model(tiny.causal_model(), peft.LoraConfig(target_modules=["q_proj"])), 400.0)
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged", "--dtype", "float16") == 2
    assert "not finite in float16" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_one_line(tmp_path, capsys):
    base = tiny.save_model(tmp_path / "base")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny.causal_model(), config).save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged") == 2
    assert "cannot be merged into weights" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "lost"), [("float32", False), ("bfloat16", True)])
def test_an_adapter_that_rounding_takes_is_said_to_be_lost(tmp_path, capsys, dtype, lost):
    """Steps of fine-tuning are often smaller than half of a bfloat16's last bit: the merged model is then the base."""
    base = tiny.save_model(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    moved(peft.get_peft_model(tiny.causal_model(), config), 3e-5).save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged", "--dtype", dtype) == 0
    assert ("little of it is left; merge in --dtype float32" in " ".join(capsys.readouterr().out.split())) == lost
