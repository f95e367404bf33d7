"""A random model, a tokenizer and texts, made in the output folder: for suites that need no hub and no download."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zotune.errors import InputError

FILLER = ("the", "film", "day", "was", "a", "and", "of", "this")
DECIDING = ("terrible", "great")
SPECIAL = ("<s>", "</s>")


def make_model(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """A causal model of the config with random weights, and a byte-level BPE tokenizer, as `from_pretrained` takes them."""
    if (folder / "tokenizer.json").is_file():  # written last
        return folder
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    partial = _fresh(folder)
    torch.manual_seed(seed)
    made = transformers.AutoConfig.for_model(**config)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(partial)
    _tokenizer(int(config.get("vocab_size", 320))).save_pretrained(partial)
    os.replace(partial, folder)
    return folder


def make_texts(folder: Path, sizes: Mapping[str, int]) -> Path:
    """A folder of .jsonl splits: short texts whose last word decides their label, every other one of each."""
    if folder.is_dir():
        return folder
    partial = _fresh(folder)
    partial.mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        draw = random.Random(f"texts:{seed}")
        rows = []
        for i in range(int(sizes.get(split, 100))):
            words = [draw.choice(FILLER) for _ in range(draw.randrange(2, 7))]
            rows.append({"text": " ".join([*words, DECIDING[i % 2]]), "label": i % 2})
        (partial / f"{split}.jsonl").write_text(
            "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8"
        )
    os.replace(partial, folder)
    return folder


def make(what: str, definition: Mapping[str, Any], folder: Path) -> Path:
    if what == "model":
        return make_model(folder, definition)
    if definition.get("kind") != "words":
        raise InputError(f"made: {definition.get('kind')!r}: only 'words' can be made")
    return make_texts(folder, {k: v for k, v in definition.items() if k != "kind"})


def _tokenizer(vocabulary: int) -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join((*FILLER, *DECIDING, "It was bad It was good"))] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def _fresh(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial
