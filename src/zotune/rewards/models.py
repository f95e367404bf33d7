"""A reward model by name: the score that a sequence classifier gives a prompt with its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zotune.errors import InputError
from zotune.rewards.builtin import text_of

ROWS = 16  # of one forward


def model_reward(name: str) -> Callable[..., Any]:
    """`model:NAME`, a hub name or a folder: of one output the logit, of two the second's log-odds; more are refused, since no one
    of them is a reward. Messages are joined by the model's chat template where it has one, all else as text.
    """
    if not name:
        raise InputError("write model:NAME, a hub name or a folder of a sequence classifier")
    held: list[Any] = []

    def call(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        import torch

        if not held:
            held.extend(_loaded(name))
        model, tokenizer, device = held
        texts = [_joined(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for first in range(0, len(texts), ROWS):
            batch = tokenizer(texts[first : first + ROWS], return_tensors="pt", padding=True, truncation=True).to(
                device
            )
            with torch.no_grad():
                logits_BL = model(**batch).logits.double()
            found += (logits_BL[:, -1] if logits_BL.shape[1] == 1 else logits_BL[:, 1] - logits_BL[:, 0]).tolist()
        return found

    held.extend(_loaded(name))  # now: a wrong name is told before anything is run
    return call


def _loaded(name: str) -> tuple[Any, Any, Any]:
    import torch

    from zotune.models.ids import agree
    from zotune.models.loading import load_model, load_tokenizer, pick_device

    device = pick_device("auto")
    tokenizer = load_tokenizer(name)
    model: Any = load_model(name, kind="classifier", device=device)
    if getattr(model, "fresh_parameters", None):
        raise InputError(f"{name} has no trained head, so that its scores say nothing; name a reward model")
    outputs = int(model.config.num_labels)
    if outputs > 2:
        raise InputError(
            f"{name} has {outputs} outputs; a reward model has one, or two of which the second is the good one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    agree(model, tokenizer, f"model:{name}")
    return model.requires_grad_(False), tokenizer, torch.device(device)


def _joined(tokenizer: Any, prompt: Any, completion: Any) -> str:
    if isinstance(prompt, str):
        return prompt + text_of(completion)
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
    return "\n".join(str(message.get("content", "")) for message in [*prompt, *completion])
