"""An ordinary Hugging Face script, with two words changed: `Trainer` is `ZOTrainer`, and there is a `method`.

python examples/trainer.py --model demo/model --data demo/data --steps 20      (after `make demo`)
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from zotune import ZOTrainer


def rows(path: Path, tokenizer):
    """Texts with what follows them; only the last word is learnt."""
    word = {"negative": " terrible", "positive": " great"}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["text"] + " It was")["input_ids"]
        answer = tokenizer(word[row["label"]])["input_ids"]
        yield {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def collate(batch):
    import torch

    length = max(len(row["input_ids"]) for row in batch)
    pad = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [pad[k]] * (length - len(row[k])) for row in batch]) for k in pad}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="demo/trainer")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = ZOTrainer(
        method="zo-sgd",
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=TrainingArguments(
            output_dir=options.output,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_steps=options.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            eval_strategy="steps",
            eval_steps=options.steps,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=list(rows(options.data / "train.jsonl", tokenizer)),
        eval_dataset=list(rows(options.data / "validation.jsonl", tokenizer)),
        data_collator=collate,
    )
    trainer.train()


if __name__ == "__main__":
    main()
