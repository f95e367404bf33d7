"""examples/grpo_rewards.py: what a GRPO script's functions are given, and give, by zotune, and by TRL where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo_rewards.py"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("grpo_rewards", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("by", ["zotune", "trl"])
def test_the_same_functions_serve_both(by, example, tmp_path, monkeypatch):
    if by == "trl":
        pytest.importorskip("trl")
    model = tiny.save_model(tmp_path / "model")
    tokenizer = tiny.tokenizer(bos=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    monkeypatch.setattr(sys, "argv", ["grpo_rewards.py", "--model", str(model), "--steps", "2", "--with", by])
    lines = example.main()
    assert len(lines) == 2
    names = {f"rewards/{function.__name__}/mean" for function in example.FUNCTIONS}
    assert names | {"reward", "reward_std", "share_with_a_number", "completions/mean_length"} <= set(lines[-1])
