"""Steps of many kinds in a plain loop, each worker with the same batches: what comes out of them, as JSON.

python steps.py FOLDER          torchrun --nproc-per-node N steps.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import zotune
from zotune.models import schemes

ROWS, TOKENS = 7, 9  # a prime of rows: the last piece is a short one
KINDS: dict[str, dict[str, Any]] = {
    "zo-sgd": {"micro_batch": 1},
    "zo-sgd, two rows": {"micro_batch": 2},
    "zo-sgd, separate forwards": {"micro_batch": 3, "engine": "sequential", "direction": "rademacher"},
    "zo-sgd, dual holds its updates": {"micro_batch": 2, "engine": "dual"},
    "zo-adam": {"micro_batch": 2, "method": "zo-adam", "lr": 1e-3},
    "momentum in bfloat16": {"micro_batch": 2, "method": "zo-sgd-mmt", "dtype": torch.bfloat16},
    "float64": {"micro_batch": 2, "dtype": torch.float64, "groups": "batch"},
    "queries": {"micro_batch": 2, "queries": 3},
    "rows with queries": {"micro_batch": 2, "groups": "batch", "queries": 2},
    "rows, one-sided": {"micro_batch": 1, "groups": "batch", "queries": 2, "estimator": "one-sided"},
    "rows, leave-one-out": {"micro_batch": 2, "groups": "batch", "queries": 3, "estimator": "leave-one-out"},
    "leave-one-out": {"micro_batch": 2, "queries": 3, "estimator": "leave-one-out"},
    "groups across pieces": {"micro_batch": 2, "groups": 3, "queries": 2},
    "lowrank": {"micro_batch": 3, "engine": "lowrank", "rank": 2},
    "lowrank, cut": {"micro_batch": 3, "groups": "batch", "queries": 2, "forward_tokens": 2 * TOKENS},
    "lora": {"micro_batch": 2, "scheme": "lora", "groups": "batch", "lr": 1e-1},
    "own inputs": {"micro_batch": 2, "method": "own-inputs", "queries": 2},
    "fzoo": {"micro_batch": 2, "method": "fzoo", "queries": 3},
    "conservative": {"micro_batch": 2, "method": "zo-sgd-cons"},
    "blocks": {"micro_batch": 2, "blocks": "transformer"},
    "masks": {"micro_batch": 2, "sparsity": 0.5, "mask_refresh": 2},
    "folds": {"micro_batch": 2, "fold_every": 2},
    "several batches": {"micro_batch": 2, "several": True},
}


def batch_of(step: int, rows: int = ROWS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(0, tiny.VOCABULARY, (rows, TOKENS), generator=draw)}


def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trained(workers: Any, steps: int = 4, **options: Any) -> dict[str, Any]:
    """Weights, and every step's losses and projected gradients as the step saw them, to the bit."""
    dtype, scheme, several = (
        options.pop(k, d) for k, d in (("dtype", torch.float32), ("scheme", "full"), ("several", False))
    )
    model = tiny.causal_model().to(dtype)
    torch.manual_seed(0)
    model = schemes.prepare(model, scheme, []).eval()
    before = digest(model)
    optimizer = zotune.ZeroOrderOptimizer(model, workers=workers, **({"lr": 1e-2, "seed": 5} | options))
    seen: list[Any] = []
    optimizer.watch = lambda record: seen.append([[float(x).hex() for x in g] for g in (record.losses_P, *record.g_GQ)])

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return row_losses(model, batch)

    for step in range(steps):
        batches = [batch_of(2 * step, 3), batch_of(2 * step + 1, 4)] if several else batch_of(step)
        loss = optimizer.step(loss_of, batch=batches)
        seen.append(float(loss).hex())
    optimizer.flush()
    after = digest(model)
    assert after != before
    sent = {"sent": workers.sent} if workers is not None else {}
    return {"weights": after, "steps": seen, "passes": optimizer.forward_passes} | sent


if __name__ == "__main__":
    workers = zotune.join()
    found = {name: trained(workers, **options) for name, options in KINDS.items()}
    rank = 0 if workers is None else workers.rank
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
