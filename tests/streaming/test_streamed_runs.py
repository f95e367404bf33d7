"""`zotune train --max-gpu-memory`: the run, its record and its checkpoints are those of weights that stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny import TEMPLATE, WORDS, text_rows, tokenizer, write_rows

import zotune.prepare.placing
from zotune.cli.estimate import estimate
from zotune.errors import InputError
from zotune.options import EstimateConfig, TrainConfig
from zotune.options.checks import resolve
from zotune.run.train import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer(bos=True).save_pretrained(tmp_path / "base")
    (tmp_path / "rows").mkdir()
    for part, size in (("train", 24), ("validation", 8), ("test", 8)):
        write_rows(tmp_path / "rows" / f"{part}.jsonl", text_rows(size))
    return tmp_path


def options(folder: Path, name: str, **more: object) -> TrainConfig:
    given = {
        "model": str(folder / "base"), "data": str(folder / "rows"), "template": TEMPLATE, "label_words": WORDS,
        "output": str(folder / name), "steps": 4, "batch_size": 4, "eval_every": 2, "save_every": 2, "device": "cpu",
        "method": "zo-sgd", "lr": 1e-3, "eps": 1e-2, "forward_tokens": 512,
    }  # fmt: skip
    return resolve(TrainConfig, given | more, None)


@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("engine", ["lowrank", "dual"])
def test_a_run_is_that_of_weights_that_stay(folder, engine, scheme, monkeypatch):
    train(options(folder, "stay", engine=engine, scheme=scheme))
    monkeypatch.setattr(zotune.prepare.placing, "CARDS", {"cpu"})
    asked = []
    whole = zotune.prepare.placing.stream
    monkeypatch.setattr(zotune.prepare.placing, "stream", lambda *a: asked.append(whole(*a)) or asked[0])
    train(options(folder, "go", engine=engine, scheme=scheme, max_gpu_memory="600MiB"))
    assert asked[0].moved_in > 0
    lines = [[json.loads(x).get("loss") for x in (folder / n / "metrics.jsonl").open()] for n in ("stay", "go")]
    assert lines[0] == lines[1]
    first, *_ = sorted((folder / "stay" / "model").glob("*.safetensors"))
    stay, go = (load_file(folder / name / "model" / first.name) for name in ("stay", "go"))
    assert stay.keys() == go.keys()
    assert all(torch.equal(stay[name], go[name]) for name in stay)


def test_a_budget_that_is_too_small_says_the_least(folder, monkeypatch):
    monkeypatch.setattr(zotune.prepare.placing, "CARDS", {"cpu"})
    with pytest.raises(InputError, match=r"give 0\.5\dGiB at least"):
        train(options(folder, "go", max_gpu_memory="100MiB"))


def test_an_estimate_says_what_crosses(tmp_path, capsys):
    tf.OPTConfig(hidden_size=7168, ffn_dim=28672, num_hidden_layers=48, num_attention_heads=56).save_pretrained(
        tmp_path
    )
    given = {"model": str(tmp_path / "config.json"), "dtype": "bfloat16", "max_gpu_memory": "8GiB", "method": "zo-sgd"}
    estimate(resolve(EstimateConfig, given | {"card": "h200"}, None))
    out = capsys.readouterr().out
    size = 48 * 12 * 7168**2 * 2
    assert f"3 layers of {size / 48 / 2**30:.2f} GiB" in out
    assert f"brings {size / 2**30:.2f} GiB, as many back" in out
    assert f"{size / 55e9:.2f} s at 55 GB/s" in out


def test_it_is_of_a_card(folder):
    with pytest.raises(InputError, match="--max-gpu-memory 6GiB: is of a card"):
        train(options(folder, "go", max_gpu_memory="6GiB"))


@pytest.mark.parametrize("size", ["six", "0", "-1GiB", "6GiBs", ""])
def test_what_is_no_size_is_refused(folder, size):
    with pytest.raises(InputError, match="no size of memory"):
        options(folder, "go", max_gpu_memory=size)


@pytest.mark.parametrize(
    "more", [{"max_host_memory": "1MiB", "dtype": "float32"}, {"quantize": "nf4"}], ids=["files", "nf4"]
)
def test_a_run_over_files_or_4_bits_is_that_of_weights_that_stay(folder, more, monkeypatch, capsys):
    if "quantize" in more:
        pytest.importorskip("bitsandbytes")
    stay = {k: v for k, v in more.items() if k != "max_host_memory"}
    train(options(folder, "stay", engine="lowrank", scheme="lora", **stay))
    monkeypatch.setattr(zotune.prepare.placing, "CARDS", {"cpu"})
    asked = []
    whole = zotune.prepare.placing.stream
    monkeypatch.setattr(zotune.prepare.placing, "stream", lambda *a: asked.append(whole(*a)) or asked[0])
    train(options(folder, "go", engine="lowrank", scheme="lora", max_gpu_memory="600MiB", **more))
    assert asked[0].moved_in > 0
    assert len(asked[0].in_files) == (4 if "max_host_memory" in more else 0)
    lines = [[json.loads(x).get("loss") for x in (folder / n / "metrics.jsonl").open()] for n in ("stay", "go")]
    assert lines[0] == lines[1]
    assert len({loss for loss in lines[0] if loss is not None}) > 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_host_memory": "1MiB"}, "--max-host-memory 1MiB: is of layers that stream; give --max-gpu-memory too"),
        ({"max_host_memory": "1MiB", "max_gpu_memory": "600MiB", "scheme": "full"}, "these train; use --scheme lora"),
        ({"max_gpu_memory": "600MiB", "quantize": "int8", "scheme": "lora"}, "layers in int8 do not stream"),
        ({"max_host_memory": "much", "max_gpu_memory": "600MiB"}, "no size of memory"),
    ],
)
def test_what_does_not_go_with_files_and_bits_is_a_line(folder, more, said, monkeypatch):
    monkeypatch.setattr(zotune.prepare.placing, "CARDS", {"cpu"})
    with pytest.raises(InputError, match=said):
        train(options(folder, "go", **more))
