from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> tuple[Path, Path]:
    """A model and 20 training rows: 5 steps of 4 rows an epoch."""
    folder = tmp_path_factory.mktemp("material")
    return tiny.save_model(folder / "model"), tiny.save_data(folder / "data", train=20, validation=6, test=6)


@pytest.fixture(scope="session")
def flags(material):
    """flags(**changes): those of a short run whose lines, evaluations and checkpoints fall on different steps."""

    def make(**changes: object) -> list[str]:
        short = {"steps": 16, "eval_every": 5, "save_every": 3, "log_every": 4, "sync_every": 2}
        return ["train", *tiny.flags(*material, **(short | changes))]

    return make
