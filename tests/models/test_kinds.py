"""What is no causal or masked language model and no classifier of texts: one line, with the option that serves, if any does."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf

from zotune.cli.app import run

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SMALL | {"vocab_size": tiny.VOCABULARY}
IMAGE = SMALL | {"image_size": 32, "patch_size": 16}
HALVES = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in [("layers", 1), ("attention_heads", 4)]}
HALVES |= {
    "d_model": 32,
    "vocab_size": tiny.VOCABULARY,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
}
T5 = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
MODELS_OF_A_FAMILY = {"--model-kind classifier", "loads in part"}
NONE = "no option makes one of it"
CLASSIFIER = "--model-kind classifier trains a head over label words on it"
MODELS = {
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), CLASSIFIER),
    "t5's encoder": (lambda: tf.T5EncoderModel(tf.T5Config(**T5)), CLASSIFIER),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), NONE),
    "whisper": (lambda: tf.WhisperForConditionalGeneration(whisper()), NONE),
    "clip": (lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=IMAGE)), NONE),
    "llava": (lambda: tf.LlavaForConditionalGeneration(llava()), NONE),
    "dpr": (lambda: tf.DPRQuestionEncoder(tf.DPRConfig(**TEXT)), NONE),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**HALVES)), CLASSIFIER),
    "a decoder without its head": (lambda: tf.LlamaModel(tf.LlamaConfig(**TEXT)), "--model-kind classifier"),
    "a decoder that answers questions": (lambda: tf.LlamaForQuestionAnswering(tf.LlamaConfig(**TEXT)), "loads in part"),
    "an encoder that answers questions": (
        lambda: tf.BertForQuestionAnswering(tf.BertConfig(**TEXT)),
        "--model-kind classifier",
    ),
}


def whisper() -> tf.WhisperConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return tf.WhisperConfig(**HALVES, **ids, num_mel_bins=8, max_source_positions=50, max_target_positions=40)


def llava() -> tf.LlavaConfig:
    return tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**IMAGE))


@pytest.fixture(scope="module", params=MODELS)
def other(request, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(0)
    made, says = MODELS[request.param]
    made().save_pretrained(folder / "model")
    tiny.tokenizer(bos=True).save_pretrained(folder / "model")
    tiny.save_data(folder / "data", train=8, validation=4, test=4)
    return folder, says


@pytest.mark.parametrize("command", ["train", "eval", "predict", "preview", "estimate"])
def test_another_architecture_is_one_line_with_what_serves(other, tmp_path, capsys, command):
    folder, says = other
    flags = ["--model", str(folder / "model")]
    if command == "estimate":
        says = "no others are estimated"
    else:
        flags += [
            "--model-kind",
            "causal",
            "--data",
            str(folder / "data"),
            "--template",
            tiny.TEMPLATE,
            "--label-words",
            tiny.WORDS,
        ]
    if command in ("train", "predict"):
        flags += ["--output", str(tmp_path / "out")]
    if command in ("preview", "estimate") and MODELS_OF_A_FAMILY & {says, other[1]}:
        return  # they read no weights, by which alone these differ
    assert run([command, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zotune:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "configuration class" not in lines[0]
