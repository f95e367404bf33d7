"""Small random models of the real architectures, and what tests ask of them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from zotune.engines.places import Copy, Places

V, H = 96, 32  # vocabulary, width
SIZES = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
GQA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
OPT = {"vocab_size": V, "hidden_size": H, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {
    "llama": tf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": tf.MistralConfig(**GQA),
    "qwen2": tf.Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": tf.Qwen3Config(**GQA),
    "gemma": tf.GemmaConfig(**GQA),
    "gemma2": tf.Gemma2Config(**GQA),
    "gemma3": tf.Gemma3TextConfig(**GQA, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "phi": tf.PhiConfig(**SIZES),
    "phi3": tf.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "gpt2": tf.GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64),
    "opt": tf.OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=H),
}
MASKED = {
    "bert": tf.BertConfig(**SIZES),
    "roberta": tf.RobertaConfig(**SIZES, max_position_embeddings=64),
    "deberta": tf.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
}


CORPUS = ["the film was good and bad, a great terrible day. It was good. It was bad. Awfully long! <mask>"] * 3
# How each family's tokenizer works: the algorithm, the tokens that stand before and behind a text, its mask.
TOKENIZERS = {
    "llama": ("metaspace", "<s>", "", None),
    "mistral": ("metaspace", "<s>", "", None),
    "qwen2": ("bytes", "", "", None),
    "qwen3": ("bytes", "", "", None),
    "gemma": ("metaspace", "<bos>", "", None),
    "gemma2": ("metaspace", "<bos>", "", None),
    "gemma3": ("metaspace", "<bos>", "", None),
    "phi": ("bytes", "", "", None),
    "phi3": ("metaspace", "", "", None),
    "gpt2": ("bytes", "", "", None),
    "opt": ("bytes", "</s>", "", None),
    "bert": ("wordpiece", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("bytes", "<s>", "</s>", "<mask>"),
    "deberta": ("unigram", "[CLS]", "[SEP]", "[MASK]"),
}


WIDE = {
    "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "ffn_dim": 128, "word_embed_proj_dim": 64, "n_embd": 64,
    "pooler_hidden_size": 64,
}  # fmt: skip


def build(name: str, kind: str = "", vocabulary: int = V, wide: bool = False) -> nn.Module:
    """kind "classifier": with three labels; else the family's language model. wide: all widths multiples of 64."""
    torch.manual_seed(0)
    config = copy.deepcopy((CAUSAL | MASKED)[name])
    for key in WIDE if wide else ():
        if getattr(config, key, None):
            setattr(config, key, WIDE[key])
    config.vocab_size = vocabulary
    auto = tf.AutoModelForCausalLM if name in CAUSAL else tf.AutoModelForMaskedLM
    if kind == "classifier":
        config.num_labels, auto = 3, tf.AutoModelForSequenceClassification
        config.pad_token_id = config.pad_token_id or 0
    return auto.from_config(config).eval()


def tokenizer(name: str) -> tf.PreTrainedTokenizerFast:
    """A small tokenizer with the habits of the family's own."""
    algorithm, begin, end, mask = TOKENIZERS[name]
    pad = {"roberta": "<pad>", "bert": "[PAD]", "deberta": "[PAD]", "opt": "<pad>"}.get(name)
    unknown = "<unk>"
    special = ["<s>", pad or "<pad>", "</s>", unknown] if algorithm == "bytes" else [pad or "<pad>", unknown]
    special += [token for token in (begin, end, "</s>") if token and token not in special]
    if algorithm == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token=unknown))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=180, special_tokens=special)
    elif algorithm == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    else:
        unigram = algorithm == "unigram"
        made = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token=unknown))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = (
            trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token=unknown)
            if unigram
            else trainers.BpeTrainer(vocab_size=180, special_tokens=special)
        )
    made.train_from_iterator([line.replace("<mask>", "") for line in CORPUS], trainer)
    ids = {token: made.token_to_id(token) for token in (begin, end) if token}
    if ids:
        single = " ".join(filter(None, [begin, "$A", end]))
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    extra = {"bos_token": begin or "<s>", "eos_token": end or "</s>"} if algorithm == "bytes" or not mask else {}
    if mask:
        extra |= {"mask_token": AddedToken(mask, lstrip=mask == "<mask>"), "cls_token": begin, "sep_token": end}
    if pad:
        extra |= {"pad_token": pad}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, **extra)


def save(name: str, folder: Path, wide: bool = False) -> Path:
    """The family's model and tokenizer, as `from_pretrained` takes them."""
    words = tokenizer(name)
    model = build(
        name, vocabulary=len(words) + 4, wide=wide
    )  # some classes of tokenizers add tokens of their own when loaded
    if words.pad_token_id is not None:
        model.config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def both(engine, loss, batch, at, shares: tuple[int, ...] = (1,)) -> torch.Tensor:
    """(2, B): an engine's losses of a batch at θ + displacement and at θ − displacement."""
    return engine.losses(loss, batch, Places(at, (Copy(1), Copy(-1)), shares))


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
