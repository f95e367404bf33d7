"""What a step costs that workers share: reckoned, simulated, and as the message's own code has it; and how many machines start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.distributed.run import get_args_parser

from zotune.cli.app import run
from zotune.estimates.fleet import Fleet, exchange_seconds, message_bytes, slowest
from zotune.workers.message import Message

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exchange() -> Any:
    spec = spec_from_file_location("exchange", ROOT / "benchmarks" / "exchange.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["exchange"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("places", "rows", "field"), [(2, None, 32), (5, None, 80), (32, 4, 512)])
def test_bytes_are_those_of_the_message(places, rows, field):
    assert message_bytes(places, rows) == len(Message().encode(field))


@pytest.mark.parametrize("workers", [1, 2, 8, 64, 1024])
def test_the_slowest_of_many_is_about_as_slow_as_reckoned(workers):
    times = np.exp(0.1 * np.random.default_rng(0).standard_normal((4000, workers))).max(1)
    assert abs(slowest(workers, 0.1) / np.median(times) - 1) < 0.01


STEADY, FRAIL = Fleet(hours=1e9), Fleet(hours=50)


@pytest.mark.parametrize("workers", [8, 128])
def test_what_is_simulated_without_failures_is_what_is_reckoned(exchange, workers):
    found = exchange.simulate(workers, 1, 2.0, STEADY, 48, steps=500)
    assert found.failures == 0
    assert abs(found.seconds / exchange.reckoned(workers, 1, 2.0, STEADY, 48) - 1) < 0.01
    assert found.exchange == pytest.approx(exchange_seconds(workers, 48, STEADY) / found.seconds, rel=1e-6)


@pytest.mark.parametrize("pieces", [1, 8])
def test_failures_cost_about_what_is_reckoned(exchange, pieces):
    found = exchange.simulate(64, pieces, 2.0, FRAIL, 48, steps=20_000)
    assert found.failures > 5
    assert abs(found.seconds / exchange.reckoned(64, pieces, 2.0, FRAIL, 48) - 1) < 0.15


def test_no_step_is_lost_and_none_is_counted_twice(exchange):
    """Without spread and talk, a step of workers that never fail takes its time."""
    still = Fleet(latency=0, bandwidth=1e18, spread=0, hours=1e12)
    assert exchange.simulate(16, 1, 3.0, still, 48, steps=100).seconds == pytest.approx(3.0)


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "vocab_size": 320,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def estimated(config: Path, *more: str) -> int:
    return run(["estimate", "--model", str(config), "--seq-len", "16", "--card", "h100", *more])


def test_zotune_estimate_tells_what_workers_do(config, tmp_path, capsys):
    assert estimated(config, "--batch-size", "64", "--workers", "8", "--output", str(tmp_path / "told.json")) == 0
    said = capsys.readouterr().out
    assert re.search(r"a worker +1 of the 8 pieces of 8 rows", said)
    assert re.search(r"sends +48 bytes a step", said)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["message"] == 48
    assert told["seconds"] > told["compute"] + told["waiting"] + told["exchange"] > 0


def test_directions_for_each_row_send_a_number_a_row_and_place(config, tmp_path):
    more = ["--batch-size", "64", "--workers", "8", "--groups", "batch", "--queries", "4", "--micro-batch", "4"]
    assert estimated(config, *more, "--output", str(tmp_path / "told.json")) == 0
    assert (
        json.loads((tmp_path / "told.json").read_text())["message"] == 16 + 4 * 8 * 8
    )  # two pieces of four rows, eight places


def test_layers_that_stream_bind_a_worker_where_its_bus_is_slower_than_its_products(config, tmp_path, capsys):
    from zotune.estimates.streaming import BUS

    more = ["--batch-size", "64", "--workers", "8", "--micro-batch", "4", "--output", str(tmp_path / "told.json")]
    assert estimated(config, *more) == 0
    whole = json.loads((tmp_path / "told.json").read_text())
    wide = CONFIG | {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 8}
    config.write_text(json.dumps(wide))
    assert estimated(config, *more, "--max-gpu-memory", "1GiB") == 0
    said, told = capsys.readouterr().out, json.loads((tmp_path / "told.json").read_text())
    matrices = 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 8192) * 4  # of its layers, float32
    assert told["compute"] == pytest.approx(2 * matrices / BUS, rel=1e-6)  # two pieces, each a crossing
    assert told["compute"] > whole["compute"]
    assert re.search(r"its memory +1.00 GiB of a card", said)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--workers", "32"), "--workers 32: a step of 16 rows has 16 pieces of 1; try --batch-size 32"),
        (("--workers", "2", "--method", "fo-sgd"), "--workers: share the places of zeroth-order steps"),
        (("--micro-batch", "2"), "--micro-batch, --groups: of a step that several share"),
    ],
    ids=str,
)
def test_what_workers_cannot_share_is_one_line(config, capsys, more, said):
    assert estimated(config, *more) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def assert_torchrun_starts_zotune(arguments: list[str], machines: int, meet: str) -> None:
    found = get_args_parser().parse_args(arguments)
    assert (found.nnodes, found.rdzv_backend, found.rdzv_endpoint) == (str(machines), "c10d", meet)
    assert (found.module, found.training_script) == (True, "zotune")
    assert found.training_script_args[0] == "train"
    assert "--resume" in found.training_script_args  # what is started again goes on


def test_slurm_s_file_starts_a_torchrun_a_machine(tmp_path):
    """Slurm's two commands are stood in for by ones that say what they were given."""
    script = ROOT / "examples" / "cluster" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name, does in (("scontrol", 'printf "n1\\nn2\\n"'), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(script), "run.yaml", "out"], env=environment, capture_output=True, text=True, check=True
    )
    own, torchrun, *arguments = done.stdout.split("\n")[:-1]
    assert (own, torchrun) == ("--kill-on-bad-exit=0", "torchrun")
    assert_torchrun_starts_zotune(arguments, 2, "n1:29500")


def test_kubernetes_file_names_its_pods_as_they_meet():
    service, job = yaml.safe_load_all((ROOT / "examples" / "cluster" / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"]
    torchrun, *arguments = container["command"]
    assert torchrun == "torchrun"
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert_torchrun_starts_zotune(arguments, spec["parallelism"], f"{first}:29500")
    given = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == given
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in arguments
