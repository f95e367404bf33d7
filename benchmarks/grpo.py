"""TRL's GRPO on what rewards.py trains on: the same prompts, reward, ends of answers, looks and lines, for as many seconds.

    pip install trl
    python benchmarks/grpo.py --model MODEL --data DATA --task squad --lr 1e-5 --seconds 300 --output grpo
    python benchmarks/grpo.py --model MODEL --task sums --prompts 2 --generations 4 --steps 2 --device cpu --output grpo

Weights and AdamW's moments are float32, forwards bfloat16 on CUDA (TRL's own default); generations by transformers' generate, no
vLLM, at temperature 1; no KL term (TRL's default). Looks are greedy. `python benchmarks/rewards.py --summary --output grpo` reads
what was written. First-order fine-tuning on the right answers, where there are any:
`zotune train --data squad --method fo-adam --scheme lora`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from rewarded import Watch, ends_of_lines, plain_texts, summary, task_of, text_loss
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--task", default="sums", help="squad, json or sums")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16, help="a step")
    parser.add_argument("--generations", type=int, default=8, help="a prompt")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--look-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: further ones of GRPOConfig")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    tf.set_seed(args.seed)
    task, cuda = task_of(args.task, args.data), args.device == "cuda"
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model: Any = tf.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    ends = sorted({tokenizer.eos_token_id, *(ends_of_lines(tokenizer) if task.line else ())})
    asked = [prompt_of(row["prompt"], task.chat) for row in task.held]
    prose = plain_texts(args.data, tokenizer)
    answers = args.prompts * args.generations
    cell = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {
        "answers": answers,
        "method": "grpo",
    }

    @torch.no_grad()
    def answer() -> list[str]:
        texts = [
            one
            if isinstance(one, str)
            else tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
            for one in asked
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(args.device)
        was, model_ = model.training, model.eval()
        made = model_.generate(
            **inputs,
            max_new_tokens=task.tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.train(was)
        return list(tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    watch = Watch(
        args.output / f"grpo-{args.task}-{args.seed}.jsonl", cell, task, answer, lambda: text_loss(model, prose)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[task.reward],
            args=GRPOConfig(
                output_dir=folder, max_steps=args.steps, per_device_train_batch_size=answers, num_generations=args.generations,
                max_completion_length=task.tokens, learning_rate=args.lr, lr_scheduler_type="constant", seed=args.seed,
                temperature=1.0, generation_kwargs={"eos_token_id": ends}, logging_steps=1, save_strategy="no", report_to=[],
                disable_tqdm=True, bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False, **args.options,
            ),
            train_dataset=Dataset.from_list([row | {"prompt": prompt_of(row["prompt"], task.chat)} for row in task.train]),
            processing_class=tokenizer,
            callbacks=[watch],
        )  # fmt: skip
        watch.begin(lr=args.lr, decoder="transformers")
        trainer.train()
    print(summary(args.output))


def prompt_of(text: str, chat: bool) -> Any:
    return [{"role": "user", "content": text}] if chat else text


if __name__ == "__main__":
    main()
