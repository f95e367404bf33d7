"""The notebooks run from their first cell to their last, on a tiny model; what they keep is no output of anybody's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_stands(path, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    model = tiny.save_model(tmp_path / "model")
    held = json.loads(path.read_text(encoding="utf-8"))
    assert (held["nbformat"], held["nbformat_minor"]) == (4, 5)
    space: dict[str, object] = {}
    for number, cell in enumerate(held["cells"]):
        assert len({"id", "cell_type", "metadata", "source"} - set(cell)) == 0
        if cell["cell_type"] != "code":
            continue
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        text = "".join(cell["source"]).replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
        exec(compile(re.sub(r"steps=\d+", "steps=4", text), f"{path.name}, cell {number}", "exec"), space)
    result = space["result"]
    assert isinstance(result, dict)
    assert result["steps"] == 4
    assert (tmp_path / "runs" / "notebook" / "model" / "model.safetensors").is_file()
