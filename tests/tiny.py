"""A tiny causal model, a tiny real tokenizer and separable texts, for tests. Everything is made here; nothing is fetched."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY, TAKES = 320, 64  # tokens there are, tokens the model takes
WORDS = '{"0": "bad", "1": "good"}'
TEMPLATE = "{text} It was"
CORPUS = ["the film was good and bad, a great terrible day It was good It was bad"] * 3


def tokenizer(bos: bool = False, eos: bool = False) -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE. bos, eos: whether a text's ids begin with <s> and end with </s>, as LLaMA's and T5's do."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def causal_model(tie: bool = True, seed: int = 0) -> tf.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TAKES, tie_word_embeddings=tie,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def save_model(folder: Path, tie: bool = True) -> Path:
    """Model and tokenizer, as `from_pretrained` takes them."""
    causal_model(tie).save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    return folder


def text_rows(size: int, seed: int = 0) -> list[dict]:
    """Short texts that end in "great" (label 1) or "terrible" (0), every other one."""
    draw = random.Random(seed)
    rows = []
    for i in range(size):
        filler = " ".join(draw.choice(["the", "film", "day", "was", "a"]) for _ in range(draw.randrange(2, 6)))
        rows.append({"text": f"{filler} {'great' if i % 2 else 'terrible'}", "label": i % 2})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_data(folder: Path, **sizes: int) -> Path:
    """A folder with a .jsonl a split; by default train, validation and test."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate((sizes or {"train": 60, "validation": 20, "test": 30}).items()):
        write_rows(folder / f"{split}.jsonl", text_rows(size, seed))
    return folder


def flags(model: Path, data: Path, **changes: object) -> list[str]:
    """The flags of a short run of `zotune train`, without --output. A change of None leaves a flag out."""
    options = {
        "model": model, "data": data, "template": TEMPLATE, "label_words": WORDS, "steps": 6, "eval_every": 2,
        "log_every": 1, "batch_size": 4, "lr": "1e-2", "device": "cpu",
    } | changes  # fmt: skip
    return [s for k, v in options.items() if v is not None for s in ("--" + k.replace("_", "-"), str(v))]
