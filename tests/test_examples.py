"""The examples that a run of seconds proves: as a user calls them, on a tiny model."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("by", [[], ["--trainer"]], ids=["loop", "trainer"])
def test_an_adapter_of_peft_learns_and_is_loaded_again_by_peft(tmp_path, monkeypatch, capsys, by):
    model, data = tiny.save_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    for seed, split in enumerate(("train", "test")):
        rows = tiny.text_rows(64, seed)
        tiny.write_rows(
            data / f"{split}.jsonl", [row | {"label": ("negative", "positive")[row["label"]]} for row in rows]
        )
    script = EXAMPLES / "zo_finetuning" / "zo_finetuning.py"
    given = [
        "--model",
        model,
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--steps",
        60,
        "--queries",
        4,
        "--lr",
        0.3,
        *by,
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, given)])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    before = float(re.search(r"before: ([\d.]+) %", said)[1])
    after, loaded = map(float, re.search(r"after:  ([\d.]+) %, and ([\d.]+) %", said).groups())
    assert after == loaded
    assert after > before + 10, said
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
