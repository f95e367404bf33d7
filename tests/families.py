"""Small random models of the real architectures, and what tests ask of them."""

from __future__ import annotations

import copy

import torch
import transformers as tf
from torch import nn

V, H = 96, 32  # vocabulary, width
SIZES = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
GQA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
OPT = {"vocab_size": V, "hidden_size": H, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {
    "llama": tf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": tf.MistralConfig(**GQA),
    "qwen2": tf.Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma2": tf.Gemma2Config(**GQA),
    "phi": tf.PhiConfig(**SIZES),
    "gpt2": tf.GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64),
    "opt": tf.OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=H),
}
MASKED = {
    "bert": tf.BertConfig(**SIZES),
    "roberta": tf.RobertaConfig(**SIZES, max_position_embeddings=64),
    "deberta": tf.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    auto = tf.AutoModelForCausalLM if name in CAUSAL else tf.AutoModelForMaskedLM
    return auto.from_config(copy.deepcopy((CAUSAL | MASKED)[name])).eval()


def snapshot(model: nn.Module) -> list[tuple[int, int, torch.Tensor]]:
    return [(id(p), p.data_ptr(), p.detach().clone()) for p in model.parameters()]


def unchanged(model: nn.Module, before: list[tuple[int, int, torch.Tensor]]) -> bool:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        id(p) == key
        and p.data_ptr() == ptr
        and torch.equal(p.view(width[p.element_size()]), old.view(width[p.element_size()]))
        for p, (key, ptr, old) in zip(model.parameters(), before, strict=True)
    )
