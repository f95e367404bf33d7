"""Estimates against measured peaks, and against the figures of design runs on an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from zotune.bench.probe import _until_free
from zotune.cli.app import run
from zotune.engines.following import WORTH_ON_CPU
from zotune.errors import InputError
from zotune.estimates.estimate import compare, estimate, estimate_for, uncounted
from zotune.estimates.meta import build, model_config
from zotune.estimates.needs import needs_of
from zotune.estimates.rates import CARDS
from zotune.estimates.tally import Allocations
from zotune.estimators import TwoSided
from zotune.methods import METHODS, Method, Preset
from zotune.models.schemes import SCHEMES
from zotune.updates import Adam

SMALL = {"random": {
    "model_type": "llama", "vocab_size": 20000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": False,
}}  # fmt: skip
TIED = {"random": SMALL["random"] | {"tie_word_embeddings": True}}
OPT_1B = {"random": {
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "word_embed_proj_dim": 2048, "max_position_embeddings": 2048,
}}  # fmt: skip
OPT_13B = {"random": OPT_1B["random"] | {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
                                         "num_attention_heads": 40, "word_embed_proj_dim": 5120}}  # fmt: skip
LLAMA_7B = {"random": {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}}  # fmt: skip
SHAPE = {"batch_size": 8, "dtype": "float32"}


SPECS = (
    {"method": "zo-sgd", "scheme": "full"},
    {"method": "fo-adam", "scheme": "lora", "checkpointing": True},
    {"method": "fo-adam", "scheme": "full", "dtype": "bfloat16"},
    {"method": "zo-adam", "scheme": "full", "dtype": "bfloat16", "state_dtype": "bfloat16"},
    {"method": "fo-adam", "scheme": "full"},
    {"method": "forward-grad", "scheme": "lora"},
    {"method": "forward-grad", "scheme": "full"},
    {"method": "forward-grad", "scheme": "prompt"},
    {"method": "zo-sgd", "scheme": "full", "model": TIED},
)
MEASURE = """
import json, sys
from zotune.bench.probe import measure
print(json.dumps([measure(options) for options in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_memory_is_within_a_tenth_of_the_measured_peak():
    """Measured in a process of its own, the smallest first: what a larger one leaves behind would help it."""
    options = [SHAPE | {"model": SMALL, "tokens": 64, "steps": 2, "device": "cpu"} | spec for spec in SPECS]
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # a thread has buffers of its own
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    for spec, measured in zip(SPECS, json.loads(said.splitlines()[-1]), strict=True):
        given = SHAPE | spec
        model = model_config(given.pop("model", SMALL))
        made = estimate(model, seq_len=64, engine="sequential", **given)  # no batch is given
        assert made.peak == pytest.approx(measured["peak_bytes"], rel=0.1)
        assert made.trainable == measured["trainable_parameters"]


@pytest.mark.parametrize(
    ("source", "tokens", "spec", "gib"),
    [
        (OPT_13B, 256, {"method": "zo-sgd"}, 25.05),
        (OPT_13B, 256, {"method": "zo-sgd", "engine": "lowrank"}, 24.97),
        (LLAMA_7B, 2048, {"method": "zo-sgd", "batch_size": 4}, 14.19),
        (LLAMA_7B, 2048, {"method": "zo-sgd", "batch_size": 4, "engine": "lowrank"}, 14.16),
        (OPT_13B, 256, {"method": "zo-sgd", "scheme": "prefix"}, 25.08),
        (OPT_13B, 256, {"method": "forward-grad"}, 26.27),
        (LLAMA_7B, 1024, {"method": "forward-grad", "scheme": "lora", "batch_size": 4}, 15.99),
        (OPT_13B, 256, {"method": "fo-adam", "scheme": "lora", "checkpointing": True}, 28.0),
        (OPT_13B, 256, {"method": "fo-adam", "scheme": "lora"}, 49.9),
        (LLAMA_7B, 256, {"method": "fo-adam", "scheme": "lora", "checkpointing": True}, 15.19),
        (OPT_1B, 256, {"method": "fo-adam", "state_dtype": "parameter"}, 14.64),
    ],
)
def test_the_peaks_measured_on_an_h100_are_met(source, tokens, spec, gib):
    """Measured with PyTorch 2.x, 16 rows, bfloat16; first order with logits at all positions, to 5 %, ZO at one, to 1 %."""
    is_zo = not spec["method"].startswith("fo-")
    common = {"batch_size": 16, "seq_len": tokens, "dtype": "bfloat16", "answer_tokens": 1 if is_zo else tokens - 1}
    made = estimate(model_config(source), rates=CARDS["h100"], **(common | spec))
    assert made.peak / 2**30 == pytest.approx(gib, rel=0.01 if is_zo else 0.05)


@pytest.mark.parametrize(
    ("source", "spec", "seconds"),
    [
        (OPT_13B, {"method": "zo-sgd"}, 0.394),
        (LLAMA_7B, {"method": "zo-sgd", "scheme": "lora"}, 0.230),
        (OPT_1B, {"method": "zo-sgd", "dtype": "float32"}, 0.431),
        (OPT_13B, {"method": "forward-grad"}, 0.912),
        (LLAMA_7B, {"method": "forward-grad", "scheme": "lora", "seq_len": 1024, "batch_size": 4}, 0.780),
    ],
)
def test_the_times_measured_on_an_h100_are_met(source, spec, seconds):
    common = {"batch_size": 16, "seq_len": 256, "dtype": "bfloat16", "rates": CARDS["h100"]}
    made = estimate(model_config(source), **(common | spec))
    assert seconds / 1.35 < made.step_seconds < seconds * 1.35


def test_float32_products_are_slower_than_tf32s_and_these_than_16_bits():
    took = [
        estimate(model_config(LLAMA_7B), dtype=dtype, rates=CARDS["a100"], tf32=tf32).step_seconds
        for dtype, tf32 in (("float32", False), ("float32", True), ("bfloat16", True))
    ]
    assert took[0] > 2 * took[1] > 3 * took[2]
    assert CARDS["a100"].of_products(torch.float32, True).of_products(torch.float32, False).flops == 100e12


def test_weights_and_states_are_counted_to_the_byte():
    config = model_config(SMALL)
    numbers = sum(p.numel() for p in build(config, torch.float32).parameters())
    for method, state in (("zo-sgd", 0), ("zo-sgd-mmt", 4), ("zo-adam", 8), ("fo-adam", 8), ("fo-sgd", 0)):
        made = estimate(config, method=method, seq_len=16, **SHAPE)
        assert (made.weights, made.state, made.trainable) == (4 * numbers, state * numbers, numbers)
        assert made.gradients == (4 * numbers if method.startswith("fo-") else 0)
        assert made.peak == made.weights + made.gradients + made.state + made.activations


def test_a_state_has_the_dtype_that_was_asked_for():
    config = model_config(SMALL)
    numbers = sum(p.numel() for p in build(config, torch.bfloat16).parameters())
    for method, dtype, state in (
        ("fo-adam", None, 8), ("fo-adam", "parameter", 4), ("zo-adam", "bfloat16", 4), ("zo-sgd-mmt", "parameter", 2),
    ):  # fmt: skip
        made = estimate(config, method=method, dtype="bfloat16", state_dtype=dtype, seq_len=16)
        assert made.state == state * numbers
    made = estimate(config, dtype="bfloat16", rounding="compensated", seq_len=16)
    assert made.state == 2 * numbers


@pytest.mark.parametrize(
    "more",
    [{"hybrid": 0.5, "fo_lr": 1e-3}, {"blocks": "linear"}, {"sparsity": 0.5, "mask": "wanda"}],
)
def test_what_the_estimate_does_not_count_is_left_blank(more):
    assert estimate_for(SMALL, SHAPE | {"method": "zo-sgd", "device": "cpu"})["peak_bytes"] > 0
    assert estimate_for(SMALL, SHAPE | {"method": "zo-sgd", "device": "cpu"} | more) == {}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hybrid": 0.5}, "no estimate of --hybrid 0.5"),
        ({"blocks": "linear", "groups": "batch"}, "no estimate of --blocks linear"),
        ({"groups": "batch"}, ""),
        ({"sparsity": 0.5, "mask": "wanda"}, "no estimate of --mask wanda"),
        ({"sparsity": 0.5, "mask": "random", "groups": 1}, ""),
    ],
)
def test_what_is_left_blank_has_a_reason(more, said):
    assert uncounted({"method": "zo-sgd"} | more) == said


def test_a_plan_says_of_each_run_that_cannot_be_reckoned_why(suite_file, tmp_path):
    from zotune.bench.plan import foresee, make_plan
    from zotune.bench.suite import expand, load_suite
    from zotune.cli.bench import unknown

    def said(**changes) -> list[str]:
        plan = make_plan(expand(load_suite(suite_file(**changes))), tmp_path)
        foresee(plan)
        return unknown(plan.runs)

    grid = {"model": "tiny", "task": "words", "method": "zo-sgd", "scheme": "full"}
    blocks = said(grid=grid | {"seed": [0, 1], "blocks": "linear"}, budget={"steps": 2})
    assert blocks == ["no estimate of --blocks linear (2 runs)"]
    gone = said(grid=grid | {"model": "gone"}, models={"gone": {"model": str(tmp_path / "gone")}})
    assert [line.split(": ", 1)[1] for line in gone] == ["no such file or folder (1 run)"]
    assert said(grid=grid) == []


def test_a_method_of_one_s_own_is_estimated_once_it_is_registered(monkeypatch):
    """By what it says of itself: forwards, state, kind."""
    own = Preset("own", "", "4q", lambda queries=2: Method(TwoSided(queries), Adam("float32")))
    monkeypatch.setitem(METHODS, "own", own)
    made = estimate(model_config(SMALL), method="own", seq_len=16, queries=2, rates=CARDS["h100"], **SHAPE)
    known = estimate(model_config(SMALL), method="zo-adam", seq_len=16, queries=2, rates=CARDS["h100"], **SHAPE)
    assert made.forwards == 4
    assert replace(made, method="zo-adam") == known
    assert estimate(model_config(SMALL), method="own", seq_len=16, rates=CARDS["h100"], **SHAPE) == made
    assert needs_of("own").kind == "zeroth-order"


def test_a_method_that_is_named_by_its_module_is_estimated_as_it_says():
    common = SHAPE | {"seq_len": 16, "rates": CARDS["h100"]}
    made = estimate(model_config(SMALL), method="own_methods:cubed", queries=3, **common)
    momentum = estimate(model_config(SMALL), method="zo-sgd-mmt", queries=3, **common)
    assert (made.forwards, made.state) == (6, momentum.state)
    assert estimate_for(SMALL, SHAPE | {"method": "own_methods:cubed", "device": "cpu"})["peak_bytes"] > 0
    with pytest.raises(InputError, match="no_such_module"):
        needs_of("no_such_module:X")


def test_every_method_says_what_it_needs():
    assert {name for name in METHODS if needs_of(name).kind == "first-order"} == {"fo-sgd", "fo-adam"}
    assert {name for name in METHODS if needs_of(name).kind == "forward-mode"} == {"forward-grad"}
    assert {name: needs_of(name).state_copies for name in METHODS if needs_of(name).state_copies} == {
        "zo-sgd-mmt": 1, "zo-adam": 2, "fo-adam": 2,
    }  # fmt: skip
    with pytest.raises(InputError, match="did you mean 'zo-sgd'"):
        needs_of("zo-sdg")


def test_the_more_places_a_forward_has_the_more_it_takes_and_the_fewer_there_are():
    config, common = model_config(SMALL), SHAPE | {"queries": 3, "seq_len": 16, "rates": CARDS["h100"]}
    tokens = SHAPE["batch_size"] * 16
    two, six, ten = (estimate(config, forward_tokens=places * tokens, **common) for places in (2, 6, 10))
    assert six.activations > two.activations  # a tile of weights stands in both for the most
    assert (six.forwards, six.step_seconds < two.step_seconds) == (two.forwards, True)
    assert ten == six  # a step of three directions has six
    one_sided = [estimate(config, estimator="one-sided", forward_tokens=n * tokens, **common) for n in (1, 2, 4)]
    assert [made.forwards for made in one_sided] == [4, 4, 4]
    assert one_sided[0].activations < one_sided[1].activations < one_sided[2].activations


def test_where_nothing_is_said_a_forward_has_as_many_places_as_the_engines_take():
    config, pair = model_config(SMALL), SHAPE | {"queries": 3, "seq_len": 16}
    tokens = SHAPE["batch_size"] * 16
    assert tokens < WORTH_ON_CPU
    on_cpu = 2 * WORTH_ON_CPU
    assert estimate(config, **pair) == estimate(config, forward_tokens=on_cpu, **pair)
    long = pair | {"batch_size": 2048, "rates": CARDS["t4"]}  # 32,768 tokens, of which such a card takes 4,096 together
    assert estimate(config, **long) == estimate(config, forward_tokens=2 * 2048 * 16, **long)  # a pair at least
    eight = pair | {"queries": 8, "rates": CARDS["t4"], "batch_size": 64}  # 1,024 tokens
    assert estimate(config, **eight) == estimate(config, forward_tokens=4096, **eight)
    assert estimate(config, method="fzoo", **(eight | {"queries": None})).activations > 0


def test_a_row_beside_that_cannot_be_reckoned_says_why_and_takes_no_other_with_it(monkeypatch):
    def refuse(model):
        raise ValueError("no linear maps")

    config = model_config(SMALL)
    monkeypatch.setitem(SCHEMES, "lora", replace(SCHEMES["lora"], prepare=refuse))
    left_out = []
    rows = compare(config, {"method": "zo-sgd-sign", "scheme": "full"}, seq_len=17, left_out=left_out)
    assert [row.scheme for row in rows] == ["full"] * 5
    assert len(left_out) == 3
    assert left_out[0].endswith("a step cannot be counted without weights: no linear maps")


def test_a_model_that_is_not_causal_is_refused_in_a_line():
    with pytest.raises(InputError, match="t5 is no causal model"):
        estimate(model_config({"random": {"model_type": "t5"}}), seq_len=16)


def test_accumulated_batches_take_as_many_times_a_step():
    options = SHAPE | {"method": "zo-sgd", "device": "cpu"}
    one, four = (estimate_for(SMALL, options | {"accumulate": count})["step_seconds"] for count in (1, 4))
    assert four == pytest.approx(4 * one)


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        *((m, "full") for m in METHODS),
        *((m, s) for m in ("zo-adam", "fo-adam") for s in list(SCHEMES)[1:]),
    ],
)
def test_every_method_and_scheme_is_estimated_and_costs_more_than_the_weights(method, scheme):
    made = estimate(model_config(SMALL), method=method, scheme=scheme, seq_len=16, rates=CARDS["h100"], **SHAPE)
    assert made.peak > made.weights
    assert made.step_seconds > 0
    expected = {"prefix": 2 * 4 * 5 * 512, "prompt": 10 * 512, "head": 20000 * 512, "lora": 4 * 2 * 8 * 1024}
    assert made.trainable == expected.get(scheme, made.trainable)


SMOL = {"random": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                   "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                   "tie_word_embeddings": True}}  # fmt: skip


@pytest.mark.parametrize(("queries", "ms", "gib"), [(4, 8.96, 0.141), (16, 23.9, 0.402), (64, 88.8, 0.928)])
def test_directions_of_the_rows_own_take_about_what_was_measured(queries, ms, gib):
    """SmolLM2-135M on an H200: benchmarks/results/h200-2026-12-01/pop.json, pop64.json."""
    shape = {"batch_size": 16, "seq_len": 24, "dtype": "bfloat16", "queries": queries, "rates": CARDS["h200"]}
    made = estimate(model_config(SMOL), groups="batch", **shape)
    assert made.step_seconds == pytest.approx(1e-3 * ms, rel=0.2)
    assert made.peak - made.weights == pytest.approx(gib * 2**30, rel=0.35)
    assert made.peak > estimate(model_config(SMOL), engine="lowrank", **shape).peak
    rows = estimate_for(SMALL, SHAPE | {"method": "own-inputs", "device": "cpu"})
    assert rows["step_seconds"] > 0


def test_a_step_that_no_graph_holds_is_as_long_as_its_host_needs():
    """On a card: small models wait for the host, and large ones do not."""
    rates = CARDS["h100"]
    small = {"scheme": "full", "seq_len": 16, "rates": rates, **SHAPE}
    graph, derived, descent = (
        estimate(model_config(SMALL), method=method, **small) for method in ("zo-sgd", "forward-grad", "fo-sgd")
    )
    alone = estimate(model_config(SMALL), method="fo-sgd", checkpointing=True, **small)
    assert alone.step_seconds == pytest.approx(4 * alone.calls * rates.call)
    assert graph.step_seconds < descent.step_seconds < alone.step_seconds / 10
    assert derived.step_seconds < alone.step_seconds / 5
    masked = estimate(model_config(SMALL), method="zo-sgd", masked=True, **small)
    assert masked.peak < graph.peak  # no doubled batch
    assert graph.step_seconds < masked.step_seconds < alone.step_seconds
    config = model_config({"random": {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 4096}})
    large = {"method": "zo-sgd", "dtype": "bfloat16", "batch_size": 64, "seq_len": 2048, "rates": rates}
    there, back = (estimate(config, masked=masked, **large) for masked in (False, True))
    assert back.step_seconds == pytest.approx(there.step_seconds, rel=0.05)
    assert estimate_for(SMALL, SHAPE | {"method": "zo-sgd", "device": "cpu", "sparsity": 0.5})["step_seconds"] > 0


def test_what_ought_to_cost_less_does():
    config, shape = model_config(SMALL), SHAPE | {"seq_len": 256}
    full = estimate(config, method="fo-adam", **shape)
    lora = estimate(config, method="fo-adam", scheme="lora", **shape)
    checkpointed = estimate(config, method="fo-adam", scheme="lora", checkpointing=True, **shape)
    quantised = estimate(config, method="fo-adam", scheme="lora", checkpointing=True, quantised=True, **shape)
    zo = estimate(config, **shape)
    assert full.peak > lora.peak > checkpointed.peak > quantised.peak
    assert zo.peak < lora.peak
    assert estimate(config, **(shape | {"answer_tokens": 255})).peak > zo.peak
    assert full.flops == zo.flops


def test_the_command_shows_zo_beside_back_propagation(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL["random"]))
    command = ["estimate", "--model", str(tmp_path), "--seq-len", "64", "--card", "t4"]
    assert run([*command, "--output", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    for part in ("zo-sgd", "zo-adam", "lora", "checkpointing", "NF4", "fo-adam", "yes", "t4"):
        assert part in said
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == len(compare(model_config(SMALL), {"method": "zo-sgd", "scheme": "full"}, seq_len=64)) == 7
    assert len({json.dumps(row) for row in rows}) == len(rows)
    assert len(compare(model_config(SMALL), {"method": "fo-adam", "scheme": "full"}, seq_len=64, dtype="float32")) == 7
    assert len(compare(model_config(SMALL), {"method": "fo-adam", "scheme": "full"}, seq_len=64, dtype="bfloat16")) == 8
    assert run([*command, "--memory", "0.2"]) == 0
    assert " no" in capsys.readouterr().out


def test_a_small_model_is_shown_in_mib_and_rows_are_no_longer_than_it_takes(tmp_path, capsys):
    tiny = SMALL["random"] | {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
    }
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    assert (
        run(["estimate", "--model", str(tmp_path), "--card", "t4", "--method", "fo-adam", "--state-dtype", "bfloat16"])
        == 0
    )
    said = capsys.readouterr().out
    assert "16 × 48 tokens" in said
    assert "MiB" in said
    assert " 0.00 " not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "zo-sdg"], "did you mean 'zo-sgd'?"),
        (["--scheme", "lorra"], "did you mean 'lora'?"),
        (["--card", "h10"], "did you mean 'h100'?"),
        (["--seq-len", "5000"], "the model takes 512 tokens"),
        (["--checkpointing"], "method 'zo-sgd' keeps no activations"),
        (["--state-dtype", "bfloat16"], "method 'zo-sgd' keeps no state"),
        (["--model", "./nowhere"], "no such file or folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    (tmp_path / "config.json").write_text(json.dumps(SMALL["random"]))
    model = [] if "--model" in flags else ["--model", str(tmp_path)]
    assert run(["estimate", *model, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        model_config(str(tmp_path))


def test_a_value_that_is_there_is_the_model_s_own():
    """Only what the meta device cannot tell is answered for it: OPT draws a number before each layer to skip it."""
    with Allocations(nn.Linear(1, 1)):
        assert not bool(torch.rand([]) < 0.0)
        assert bool(torch.ones(2, dtype=torch.bool, device="meta").all())


def test_a_gpu_that_cannot_even_be_asked_is_waited_for(monkeypatch):
    """As long as another process that ends holds all of its memory."""
    asked = []

    def memory():
        asked.append(len(asked))
        if len(asked) < 3:
            raise RuntimeError("CUDA error: out of memory")
        return (100, 100) if len(asked) > 3 else (10, 100)

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    _until_free(seconds=60.0)
    assert len(asked) == 4
