"""A LoRA adapter of PEFT, trained by forward passes alone: a plain loop, or `ZOTrainer`.

    python examples/zo_finetuning/zo_finetuning.py --model demo/model --data demo/data              (after `make demo`)
    python examples/zo_finetuning/zo_finetuning.py --model demo/model --data demo/data --trainer

Rows are JSON lines of `text` and `label`, in train.jsonl and test.jsonl. The prompt asks for a word, and the loss is over the
words of the labels alone: a zeroth-order step has too little to tell for the whole vocabulary.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from zotune import ZeroOrderOptimizer, ZOTrainer

WORDS = {"negative": " terrible", "positive": " great"}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collate(tokenizer, batch):
    """Prompts padded on the left, so that the last position is where the word comes."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer([row["text"] + " It was" for row in batch], return_tensors="pt", padding=True)
    labels = [list(WORDS).index(row["label"]) for row in batch]
    keys = ("input_ids", "attention_mask")
    return {key: encoded[key] for key in keys} | {"labels": torch.tensor(labels)}


def of_words(words, outputs, labels, num_items_in_batch=None):
    """Cross entropy over the first tokens of the labels' words, the mean over rows."""
    return cross_entropy(outputs.logits[:, -1, words].float(), labels)


@torch.no_grad()
def accuracy(model, batches, words):
    right = total = 0
    for batch in batches:
        labels = batch.pop("labels")
        right += (model(**batch).logits[:, -1, words].argmax(-1) == labels).sum().item()
        total += len(labels)
    return 100 * right / total


def by_loop(model, batches, loss, options):
    """The loop that a user of PEFT has, without backward() and zero_grad()."""

    def loss_of(labels, batch):
        return loss(model(**batch), labels)

    model.eval()  # dropout would give θ + εz and θ − εz different networks
    optimizer = ZeroOrderOptimizer(model, method="zo-sgd", lr=options.lr, eps=1e-2, queries=options.queries, seed=0)
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), options.steps):
        optimizer.step(functools.partial(loss_of, batch.pop("labels"), batch))


def by_trainer(model, train, collator, loss, options):
    """transformers' Trainer, with two words changed."""
    args = TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=options.steps, learning_rate=options.lr, lr_scheduler_type="constant",
        per_device_train_batch_size=16, remove_unused_columns=False, save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = ZOTrainer(
        method="zo-sgd", method_options={"eps": 1e-2, "queries": options.queries}, model=model, args=args, train_dataset=train,
        data_collator=collator, compute_loss_func=loss,
    )  # fmt: skip
    trainer.train()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/adapter"))
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--queries", type=int, default=1)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS.values()]
    collator, loss = functools.partial(collate, tokenizer), functools.partial(of_words, words)
    train, test = rows(options.data / "train.jsonl"), rows(options.data / "test.jsonl")
    batches = DataLoader(train, 16, shuffle=True, collate_fn=collator, generator=torch.Generator().manual_seed(0))
    held_out = DataLoader(test, 32, collate_fn=collator)

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), config)
    model.print_trainable_parameters()
    print(f"before: {accuracy(model.eval(), held_out, words):.1f} %")
    if options.trainer:
        by_trainer(model, train, collator, loss, options)
    else:
        by_loop(model, batches, loss, options)
    after = accuracy(model.eval(), held_out, words)
    model.save_pretrained(options.output)  # adapter_config.json and adapter_model.safetensors

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    loaded = accuracy(PeftModel.from_pretrained(base, options.output).eval(), held_out, words)
    print(f"after:  {after:.1f} %, and {loaded:.1f} % loaded again from {options.output}")


if __name__ == "__main__":
    main()
