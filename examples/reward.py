"""A reward that no gradient reaches: is the answer JSON, and is the sum in it right?

    python examples/reward.py

A tiny model is made on the spot: it learns sums of two digits by back-propagation from texts, most of which say the answer in words
and one in five as JSON. So it knows the form and seldom uses it. Then `RewardTrainer` raises a reward that only looks at what the
model writes. With a real model the second half is all: give its name instead of `model`, and your own prompts.
"""

import argparse
import json
import random
import tempfile
import time

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import zotune

SUMS = [(a, b) for a in range(10) for b in range(10)]


def right_json(completions, answer, **columns):
    """1 for {"sum": the right number}, 0.3 for other JSON, 0 for what is no JSON."""
    rewards = []
    for text, wanted in zip(completions, answer, strict=True):
        try:
            found = json.loads(text)
        except ValueError:
            rewards.append(0.0)
        else:
            rewards.append(1.0 if found == {"sum": wanted} else 0.3)
    return rewards


def tokenizer():
    """A token a character."""
    letters = sorted(set('0123456789+=? {}":' + "sumisthe it"))
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def pretrained(tokens, steps, seed=0):
    """A model of about 85,000 weights that has read sums, four in five of them in words."""
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model, draw = tf.LlamaForCausalLM(config), random.Random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = []
        for a, b in draw.choices(SUMS, k=64):
            said = f'{{"sum": {a + b}}}' if draw.random() < 0.2 else f"the sum is {a + b}"
            texts.append(f"{a}+{b}=? {said}</s>")
        batch = tokens(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--reading", type=int, default=600, help="steps of back-propagation that make the model")
    options = parser.parse_args()
    began = time.monotonic()
    tokens = tokenizer()
    model = pretrained(tokens, options.reading)
    print(f"a model that knows sums: {time.monotonic() - began:.0f} s")
    rows = [{"prompt": f"{a}+{b}=? ", "answer": a + b} for a, b in SUMS]
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = zotune.RewardTrainer(
            model,
            reward_funcs=right_json,
            args=zotune.RewardTrainingArguments(
                output_dir=folder, max_steps=options.steps, members=32, sigma=2e-2, learning_rate=1e-2, temperature=1.0,
                max_completion_length=16, per_device_train_batch_size=16, logging_steps=10, log_completions=True, report_to=[],
                save_strategy="no", disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=rows[:80],
            eval_dataset=rows[80:],
            processing_class=tokens,
        )  # fmt: skip
        before = trainer.evaluate()["eval_reward"]
        began = time.monotonic()
        trainer.train()
        after = trainer.evaluate()["eval_reward"]
    print(f"reward of 20 held-out sums: {before:.2f} before, {after:.2f} after {options.steps} steps")
    print(f"{sum(step['tokens'] for step in trainer.told.values()):,} tokens in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
