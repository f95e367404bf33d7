"""What our kernels become on Hopper, compiled on any machine: no asynchronous product reads what the next rows are loaded over.

Triton keeps as many buffers of what a loop loads as its stages need. A product that is still under way when the next turn begins
(`pendings` > 0) reads one of them for longer; 3.7.1 forgets that where something else reads the same load too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is missing")

COMPILED = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zotune.decode import products
from zotune.engines import fold_kernels, kernels

FLOATS, INTS = {"scale", "scales", "t"}, {"which"}
NUMBERS = {"S", "D", "N", "P", "M", "Q", "QR", "EACH", "N0", "N1", "N2"}

def ttgir(kernel, warps, stages, **consts):
    names = kernel.arg_names
    def type_of(name):
        if name in NUMBERS or (len(name) > 2 and name[-2] == "_") or name.startswith("stride"):
            return "i32"
        return "*fp32" if name in FLOATS else "*i32" if name in INTS else "*bf16"
    kinds = {name: "constexpr" if name in consts else type_of(name) for name in names}
    whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in consts}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in consts.items()}, whole)
    return triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=warps, num_stages=stages)).asm["ttgir"]

made = {}
for slots in (1024, 64, 16):
    tiles = products._tiles(slots, [576], 2)
    warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    made[f"products {slots}"] = ttgir(
        products._products_kernel, warps, stages, R=1, HAS_BIAS=False, EXACT=False, WIDE=False, w_d=1, **tiles
    )
tile = dict(R=1, HAS_BIAS=False, EXACT=False, WIDE=False, w_d=1, BS=64, BN=64, BD=64)
made["of 64 slots"] = ttgir(products._products_kernel, 8, 3, **tile)
rows, wide, warps = fold_kernels.FOLD_MANY
made["fold"] = ttgir(
    fold_kernels._fold_kernel, warps, 3, R=1, SPLIT=True, WIDE=False, EXACT=False, COMPENSATED=True, BN=rows, BD=wide, BK=32,
    TERMS=0,
)
made["adapter"] = ttgir(
    kernels._adapter_inner_kernel, 4, 3, R=8, F=1, EXACT=False, SPLIT=True, WIDE=False, BM=64, BR=16, BD=128
)
json.dump(made, sys.stdout)
"""


def overwritten(ttgir: str) -> list[str]:
    """Buffers that a product under way reads, of which there are no more than loads ahead of it."""
    deep = {
        name: int(count) for name, count in re.findall(r"(%\w+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x", ttgir)
    }
    part_of = dict(re.findall(r"(%\w+) = ttg.memdesc_index (%\w+)\[", ttgir))
    ahead = [
        part_of.get(name) for name in re.findall(r"async_copy_global_to_local %\w+, (%\w+)", ttgir.split("scf.for")[0])
    ]
    read = re.findall(r"warp_group_dot (%\w+), (%\w+), [^\n]*isAsync = true", ttgir)
    loop = ttgir.split("scf.for")[1] if read else ""
    waits = [
        int(count) for count in re.findall(r"warp_group_dot_wait [^\n]*pendings = (\d+)", loop.split("scf.yield")[0])
    ]
    pending = max(waits, default=0)
    names = {part_of.get(name) for both in read for name in both} - {None}
    return sorted(name for name in names if pending and deep[name] < ahead.count(name) + pending)


def test_products_under_way_keep_what_they_read():
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    made = json.loads(run.stdout)
    assert "isAsync = true" in made["fold"] + made["adapter"]  # else nothing is looked at
    assert overwritten(made.pop("of 64 slots")) in (
        ["%x_BB"],
        [],
    )  # by Triton 3.7.1, why programs have fewer slots; if mended
    assert {name: overwritten(text) for name, text in made.items()} == {name: [] for name in made}
