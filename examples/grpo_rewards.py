"""Reward functions of a GRPO script, unchanged, in `RewardTrainer`.

    python examples/grpo_rewards.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/grpo_rewards.py --model HuggingFaceTB/SmolLM2-135M-Instruct --with trl    the same by TRL, if it is installed

What TRL's `GRPOTrainer` gives a reward function, this gives it too: `prompts`, `completions`, `completion_ids`, `trainer_state`,
`log_extra`, `log_metric` and every column of the rows; a function may be `async`, and gives a number or None for each completion.
"""

import argparse
import re
import tempfile

import zotune


def has_format(completions, **kwargs):
    """Whether the answer is between tags."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.fullmatch(r"\s*<answer>.*</answer>\s*", text, re.DOTALL) else 0.0 for text in texts]


async def is_right(prompts, completions, answer, log_metric=None, log_extra=None, **kwargs):
    """Whether the last number is the right one; None where the row has no answer."""
    numbers = [re.findall(r"-?\d+", completion[0]["content"]) for completion in completions]
    if log_metric is not None:
        log_metric("share_with_a_number", sum(map(bool, numbers)) / len(numbers))
        log_extra("last_number", [found[-1] if found else None for found in numbers])
    return [
        None if gold is None else float(bool(found) and found[-1] == gold)
        for found, gold in zip(numbers, answer, strict=True)
    ]


def is_short(completion_ids, trainer_state, **kwargs):
    """Less for each token behind the twentieth, the more the later in the run."""
    by = 0.01 * min(1.0, trainer_state.global_step / 50)
    return [-by * max(0, len(ids) - 20) for ids in completion_ids]


FUNCTIONS = [has_format, is_right, is_short]
WEIGHTS = [0.3, 1.0, 1.0]
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{a} + {b} = ? Answer as <answer>number</answer>."}],
        "answer": str(a + b) if a != b else None,
    }
    for a in range(1, 9)
    for b in range(1, 9)
]


def by_zotune(model, steps, folder):
    args = zotune.RewardTrainingArguments(
        output_dir=folder, max_steps=steps, reward_weights=WEIGHTS, max_completion_length=32, members=16,
        per_device_train_batch_size=8, logging_steps=1, report_to=[], save_strategy="no",
    )  # fmt: skip
    return zotune.RewardTrainer(model=model, reward_funcs=FUNCTIONS, args=args, train_dataset=ROWS)


def by_trl(model, steps, folder):
    import datasets
    import torch
    import trl

    args = trl.GRPOConfig(
        output_dir=folder, max_steps=steps, reward_weights=WEIGHTS, max_completion_length=32, num_generations=4,
        per_device_train_batch_size=8, logging_steps=1, report_to=[], save_strategy="no", bf16=torch.cuda.is_available(),
    )  # fmt: skip
    rows = datasets.Dataset.from_list(ROWS)
    return trl.GRPOTrainer(model=model, reward_funcs=FUNCTIONS, args=args, train_dataset=rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--with", dest="by", choices=["zotune", "trl"], default="zotune")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (by_zotune if options.by == "zotune" else by_trl)(options.model, options.steps, folder)
        trainer.train()
    return [line for line in trainer.state.log_history if "reward" in line]


if __name__ == "__main__":
    main()
