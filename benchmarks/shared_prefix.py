"""Candidate scoring with each row's prompt read once, against prompt and candidate as one sequence.

    python benchmarks/shared_prefix.py --model MODEL

Rows are random tokens of the shapes named: prompt T, candidates C, tokens a candidate K. Both ways score the same rows in turn, in
one process; the ratio of medians is what counts. The largest difference of a score is shown beside it.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

import torch

from zotune.models.loading import load_model
from zotune.tasks import scoring
from zotune.tasks.encoding import Encoded

SHAPES = {  # T, C, K, rows
    "copa": (10, 2, 7, 16),
    "3 choices": (40, 3, 5, 8),
    "winogrande": (14, 2, 10, 16),
    "short, 4 choices": (40, 4, 5, 8),
    "medium, 2 choices": (128, 2, 8, 8),
    "medium, 4 choices": (128, 4, 5, 8),
    "long, 2 choices": (400, 2, 8, 4),
    "record": (330, 15, 10, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    model = load_model(options.model, dtype=options.dtype, device="cpu")
    draw = random.Random(0)
    print(f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.dtype}")
    print(f"{'shape':<20}{'(C−1)·T':>8}{'apart ms':>10}{'shared ms':>11}{'ratio':>7}{'differ':>10}")
    for name in options.shapes:
        tokens, count, answer, size = SHAPES[name]
        rows = [
            Encoded(
                tuple(draw.randrange(5, 20000) for _ in range(tokens)),
                tuple(tuple(draw.randrange(5, 20000) for _ in range(answer)) for _ in range(count)),
                0,
            )
            for _ in range(size)
        ]
        seconds: dict[bool, list[float]] = {True: [], False: []}
        scores = {}
        for _ in range(options.rounds + 1):
            for shared in (False, True):
                scoring.SHARED_TOKENS = 0 if shared else 10**9
                began = time.perf_counter()
                scores[shared] = scoring.score_rows(model, rows, batch_size=options.batch_size, pad_id=0)
                seconds[shared].append((time.perf_counter() - began) / size)
        apart, once = (1000 * median(seconds[shared][1:]) for shared in (False, True))
        differ = max(
            abs(a - b) for x, y in zip(scores[False], scores[True], strict=True) for a, b in zip(x, y, strict=True)
        )
        print(f"{name:<20}{(count - 1) * tokens:>8}{apart:>10.1f}{once:>11.1f}{once / apart:>7.2f}{differ:>10.1e}")


if __name__ == "__main__":
    main()
