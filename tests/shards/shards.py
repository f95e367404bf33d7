"""Steps of a model that lies over processes, and of the same model in each of them alone; what came out, as JSON.

torchrun --nproc-per-node N shards.py FOLDER quick|all|mesh
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed import DistributedConfig

import zotune
from zotune import noise
from zotune.directions import Displacement
from zotune.directions.shards import ShardedDirections, held, part_of
from zotune.record.steps import StepRecord
from zotune.record.trajectory import Header, Record, TrajectoryWriter, read_file

STEPS = 3
PLAN = {
    "q_proj": ColwiseParallel, "k_proj": ColwiseParallel, "v_proj": ColwiseParallel, "o_proj": RowwiseParallel,
    "gate_proj": ColwiseParallel, "up_proj": ColwiseParallel, "down_proj": RowwiseParallel,
}  # fmt: skip


def model_of(hidden: int = 32, bias: bool = True, tie: bool = True) -> nn.Module:
    """hidden: a multiple of 4 heads. Its vocabulary and its inner width are no multiples of the processes."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=tiny.VOCABULARY + 1, hidden_size=hidden, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=tiny.TAKES, tie_word_embeddings=tie, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).double().eval()
    for param in model.parameters():
        if param.dim() == 1:
            nn.init.normal_(param, 0.5, 0.2)
    return model


def batch_of(step: int, rows: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(0, tiny.VOCABULARY, (rows, 7), generator=draw)}


def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).double(), ids[:, 1:], reduction="none").mean(1)


def gathered(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def gathered_once(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model)
    return model


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return split(model, mesh)


def split(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.model.layers:
        for name, style in PLAN.items():
            owner = layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp
            parallelize_module(getattr(owner, name), mesh, style())
    return model


def both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("rows", "columns"))
    split(model, mesh["columns"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["rows"])
    fully_shard(model, mesh=mesh["rows"])
    return model


def transformers_own(model: nn.Module) -> nn.Module:
    """As `from_pretrained` lays out a model that has a plan for it."""
    folder = Path(sys.argv[1]) / "model"
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size())
    found = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, distributed_config=config).eval()
    dist.barrier()
    return found


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp": gathered,
    "fsdp, gathered once": gathered_once,
    "tp": tensor_parallel,
    "tp of transformers": transformers_own,
    "fsdp of tp": both,
}
DENSE: dict[str, dict[str, Any]] = {
    "zo-sgd": {"queries": 2},
    "compensated": {"dtype": torch.bfloat16, "rounding": "compensated", "direction": "rademacher", "weight_decay": 0.1},
    "one-sided": {"queries": 2, "estimator": "one-sided", "dtype": torch.float32},
    "momentum": {"method": "zo-sgd-mmt"},
    "sign": {"method": "zo-sgd-sign", "lr": 1e-3},
    "adam": {"method": "zo-adam", "lr": 1e-3, "weight_decay": 0.1, "dtype": torch.bfloat16},
    "conservative": {"method": "zo-sgd-cons"},
    "fzoo": {"method": "fzoo", "queries": 3, "lr": 1e-4},
    "meazo": {"method": "meazo", "lr": 1e-4},
    "es": {"method": "es", "anchor": 0.01, "queries": 3, "lr": 1e-4},
    "blocks": {"blocks": "transformer"},
    "folds": {"fold_every": 2},
}
LOW_RANK: dict[str, dict[str, Any]] = {
    "rank 2": {"engine": "lowrank", "rank": 2, "queries": 2},
    "rows": {"groups": "batch", "queries": 2},
    "eggroll": {"method": "eggroll", "engine": "lowrank", "queries": 2, "lr": 1e-4, "dtype": torch.float32},
    "cut": {"groups": "batch", "forward_tokens": 14, "dtype": torch.bfloat16},
}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, as one process has them."""
    found = {}
    for name, param in model.named_parameters():
        value = param.detach()
        found[name] = value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()
    return found


def optimizer_of(model: nn.Module, **options: Any) -> zotune.ZeroOrderOptimizer:
    return zotune.ZeroOrderOptimizer(model, **({"lr": 1e-2, "seed": 5} | options))


def taken(model: nn.Module, **options: Any) -> tuple[list[StepRecord], dict[str, Tensor]]:
    optimizer, records = optimizer_of(model, **options), list[StepRecord]()
    optimizer.watch = records.append
    for step in range(STEPS):
        optimizer.step(lambda batch: row_losses(model, batch), batch=batch_of(step))
    optimizer.flush()
    return records, whole(model)


def replayed(records: list[StepRecord], path: Path, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """The weights that one process makes of the steps' record, through its file."""
    optimizer = optimizer_of(model, **options)
    groups, pairs = len(optimizer.param_groups), len(records[0].seeds_Q)
    header = Header(noise.NOISE_VERSION, optimizer.direction, "zo-sgd", 5, STEPS, pairs, groups, layout=("lr", "decay"))
    path.unlink(missing_ok=True)
    with TrajectoryWriter.create(path, header) as writer:
        for one in records:
            writer.append(Record(one.step, 0, 0, one.g_GQ[0], one.lr_G, one.decay_G, one.skipped, False, one.choice))
    optimizer.apply_records(list(read_file(path).records))
    optimizer.flush()
    return whole(model)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def of_kind(place: Path, layouts: list[str], options: dict[str, Any], engine: str) -> dict[str, Any]:
    """By layout: how far losses (relative) and weights are from those of one process, and weights from a replay of the record."""
    options, found = dict(options), {}
    dtype = options.pop("dtype", torch.float64)
    alone, expected = taken(model_of().to(dtype), **({"engine": engine} | options))
    moved = apart(expected, whole(model_of().to(dtype)))
    for layout in layouts:
        records, weights = taken(LAYOUTS[layout](model_of().to(dtype)), **options)
        pairs = [
            (a, b) for x, y in zip(records, alone, strict=True) for a, b in zip(x.losses_P, y.losses_P, strict=True)
        ]
        again = replayed(
            records, place / f"{dist.get_rank()}.zot", model_of().to(dtype), **({"engine": engine} | options)
        )
        found[layout] = {
            "losses": max(abs(a - b) / abs(b) for a, b in pairs),
            "weights": apart(weights, expected),
            "replay": apart(weights, again),
            "moved": moved,
            "g": [[x.hex() for x in one.g_GQ[0]] for one in records],
        }
    return found


SHAPES = [(1,), (7,), (16,), (2, 3), (5, 3), (131, 127), (16, 3, 6), (3, 4, 6)]


def parts_that_draw_otherwise() -> list[str]:
    """Layouts of which a part's noise is not the part of the whole's."""
    size, wrong = dist.get_world_size(), []
    line = init_device_mesh("cpu", (size,))
    meshes = [line] if size < 4 else [line, init_device_mesh("cpu", (size // 2, 2))]
    for mesh, shape, direction in itertools.product(meshes, SHAPES, noise.DIRECTIONS):
        ways = [Shard(dim) for dim in range(len(shape))] + [Replicate()]
        if shape[0] % (2 * size) == 0:  # as packed maps are laid out, in two runs
            ways.append(_StridedShard(0, split_factor=2))
        for placements in itertools.product(ways, repeat=mesh.ndim):
            if mesh.ndim > 1 and any(isinstance(p, _StridedShard) for p in placements):
                continue
            z = torch.zeros(shape)
            noise.fill(z.view(-1), 9, noise.parameter_id("w"), direction)
            expected = distribute_tensor(z, mesh, placements).to_local()
            param = distribute_tensor(torch.zeros(shape), mesh, placements)
            own, part = held(param), part_of(param)
            directions = ShardedDirections([[("w", own)]], direction, {} if part is None else {id(own): part})
            by = Displacement((9,), ((1.0,),))
            tiles = [tile.clone() for _, tile in directions.gradient_tiles(own, by, 100)]
            directions.apply(by)
            if not torch.equal(own, expected) or not torch.equal(
                torch.cat([*tiles, torch.zeros(0)]), expected.flatten()
            ):
                wrong.append(f"{shape} {direction} {placements}")
    return wrong


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """What each process is told of what cannot be."""

    def stepped(batch: dict[str, Tensor], **options: Any) -> None:
        model = gathered(model_of())
        optimizer_of(model, **options).step(lambda batch: row_losses(model, batch), batch=batch)

    def without_the_module() -> None:
        model = gathered(model_of())
        optimizer_of(model.named_parameters()).step(lambda batch: row_losses(model, batch), batch=batch_of(0))

    def moved() -> None:
        model = tensor_parallel(model_of())
        optimizer = optimizer_of(model)
        param = model.model.layers[0].mlp.up_proj.weight
        param._local_tensor = param._local_tensor.clone()
        optimizer.step(lambda batch: row_losses(model, batch), batch=batch_of(0))

    own, sharing = zotune.join(own_rows=True), zotune.join()
    rank = dist.get_rank()
    return {
        "other rows": refused(lambda: stepped(batch_of(rank))),
        "more rows": refused(lambda: stepped(batch_of(0, 3 + rank))),
        "dual": refused(lambda: stepped(batch_of(0), engine="dual")),
        "method": refused(lambda: stepped(batch_of(0), method="own-inputs")),
        "sparsity": refused(lambda: stepped(batch_of(0), sparsity=0.5)),
        "lr": refused(lambda: stepped(batch_of(0), lr="auto", total_steps=9)),
        "module": refused(without_the_module),
        "moved": refused(moved),
        "sharing": refused(lambda: stepped(batch_of(0), workers=sharing, micro_batch=1)),
        "low rank": refused(lambda: stepped(batch_of(0), workers=own, groups="batch")),
        "uneven": refused(lambda: stepped(batch_of(0, 3 + rank), workers=own)),
        "own rows of a part": refused(lambda: optimizer_of(tensor_parallel(model_of()), workers=own)),
    }


def with_own_rows() -> dict[str, Any]:
    """FSDP2 as it is used: each process has rows of its own. And one process with all of them."""
    size, rank = dist.get_world_size(), dist.get_rank()
    alone, model = model_of(), gathered(model_of())
    one, many = optimizer_of(alone, engine="sequential"), optimizer_of(model, workers=zotune.join(own_rows=True))
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, 2 * size)
        mine = {name: t[2 * rank : 2 * rank + 2] for name, t in batch.items()}
        whole_loss = float(one.step(lambda batch: row_losses(alone, batch), batch=batch))
        losses.append(abs(float(many.step(lambda batch: row_losses(model, batch), batch=mine)) - whole_loss))
    return {"losses": max(losses), "weights": apart(whole(model), whole(alone))}


QUICK = ["zo-sgd", "adam", "blocks", "rows"]


def main(place: Path, what: str) -> dict[str, Any]:
    layouts = ["fsdp of tp"] if what == "mesh" else ["fsdp", "tp"] if what == "quick" else list(LAYOUTS)[:-1]
    kinds = {kind: ("sequential", options) for kind, options in DENSE.items()}
    kinds |= {kind: ("lowrank", options) for kind, options in LOW_RANK.items()}
    if what == "quick":
        kinds = {kind: kinds[kind] for kind in QUICK}
    found: dict[str, Any] = {
        "kinds": {k: of_kind(place, layouts, options, engine) for k, (engine, options) in kinds.items()}
    }
    found["parts"] = parts_that_draw_otherwise()
    return found | ({"refused": refusals(), "own rows": with_own_rows()} if what == "quick" else {})


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    told = main(folder, sys.argv[2])
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told, indent=1))
    dist.destroy_process_group()
