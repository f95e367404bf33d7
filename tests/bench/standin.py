"""A suite of a few runs, a program that stands in for `zotune`, and how the one is run by the other."""

from __future__ import annotations

from pathlib import Path

SUITE = {
    "name": "mine",
    "models": {"tiny": {"random": {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    }}},
    "tasks": {"words": {
        "made": "words", "train": 20, "validation": 8, "test": 10, "template": "{text}",
        "label_words": {"0": "bad", "1": "good"},
    }},
    "grid": {"model": "tiny", "task": "words", "method": "zo-sgd", "scheme": "full", "seed": [0, 1]},
    "defaults": {"batch_size": 4, "lr": 1e-3, "device": "cpu", "log_every": 1},
    "budget": {"forward_passes": 8},
}  # fmt: skip

# Writes what `zotune train` writes. Seed 1 waits for a file named go; seed 2 fails; seed 3 has no memory.
PROGRAM = """
import json, math, os, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
out = Path(flags["--output"]); out.mkdir(parents=True, exist_ok=True)
(out / "pid").write_text(str(os.getpid()))
with open(out / "attempts", "a") as file: file.write("x")
if flags["--seed"] == "2": sys.exit("zotune: it broke")
if flags["--seed"] == "3": raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
(out / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "forward_passes": 2}) + chr(10))
while flags["--seed"] == "1" and not (out.parent.parent / "go").exists(): time.sleep(0.02)
lr, seed = float(flags["--lr"]), int(flags["--seed"])
(out / "result.json").write_text(json.dumps({
    "test_before": 50.0, "test_after": 60.0 + seed, "validation_best": 90 - 10 * abs(math.log10(lr) + 3), "steps": 4,
    "forward_passes": 8, "metric": "accuracy", "wall_seconds": 4.0, "peak_memory_bytes": 3 << 28,
}))
"""


class Silent:
    def changed(self, state) -> None: ...


def run_here(suite: str, folder: Path, program, **options):
    """The suite in the folder, by the program: the plan as it was, and the store."""
    from zotune.bench.plan import make_plan
    from zotune.bench.runner import execute
    from zotune.bench.store import Store
    from zotune.bench.suite import expand, load_suite

    store = Store(folder)
    plan = make_plan(expand(load_suite(suite)), folder, store, **options)
    execute(plan, store, jobs=2, gpus=0, watcher=Silent(), program=program)
    return plan, store
