"""A trajectory and its base model give the run's weights, bit for bit; anything else is refused in a line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zotune import ZeroOrderOptimizer, noise
from zotune.cli.app import run
from zotune.noise import reference
from zotune.record import replay as replays
from zotune.record.trajectory import Header, Record, TrajectoryWriter, read_file

RUNS = [
    {"seed": 3},
    {"dtype": "bfloat16", "direction": "rademacher"},
    {"groups": "batch", "lr": "1e-3"},
    {"scheme": "lora"},
    {"scheme": "prefix", "lr": "1e-2"},
    {"scheme": "prompt", "lr": "1e-2"},
    {"scheme": "head", "lr": "1e-3"},
    {"method": "zo-adam", "lr": "1e-3"},
    {"method": "zo-sgd-mmt", "weight_decay": 0.1, "lr": "1e-3"},
    {"method": "zo-sgd-cons"},
    {"method": "zo-sgd-sign", "lr": "1e-4"},
    {"queries": 3, "lr_schedule": "linear"},
    {"estimator": "one-sided", "weight_decay": 0.5},
    {"blocks": "transformer", "lr": "1e-3"},
    {"sparsity": 0.5, "accumulate": 2},
    {"groups": "batch", "lr": "1e-3", "fold_every": 2},
    {"dtype": "bfloat16", "rounding": "compensated"},
    {"dtype": "bfloat16", "engine": "dual", "lr": "1e-3"},
    {"lr": "auto", "method": "leave-one-out", "queries": 4, "groups": "batch"},
]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return tiny.save_model(folder / "model"), tiny.save_data(folder / "data")


def train(material, output: Path, **changes: object) -> Path:
    flags = [flag for flag in tiny.flags(*material, **changes) if flag != "True"]
    assert run(["train", *flags, "--output", str(output)]) == 0
    return output


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(next(p.glob("*.safetensors"))) for p in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def replay(material, output: Path, trajectory: Path, *more: str) -> int:
    flags = ["--model", str(material[0]), "--trajectory", str(trajectory), "--output", str(output)]
    device = [] if "--device" in more else ["--device", "cpu"]
    return run(["replay", *flags, *device, *more])


@pytest.mark.parametrize("changes", RUNS, ids=lambda c: "-".join(map(str, c.values())))
def test_a_replay_gives_the_bits_of_the_run(material, tmp_path, changes, capsys):
    done = train(material, tmp_path / "run", **changes)
    assert replay(material, tmp_path / "again", done / "trajectory.zot") == 0
    assert "bit for bit" in capsys.readouterr().out
    assert same_weights(done / "model", tmp_path / "again")


CUDA_RUNS: list[dict[str, object]] = [
    *({"engine": engine, "dtype": dtype} for engine in ("sequential", "dual") for dtype in ("float32", "bfloat16")),
    {"engine": "dual", "direction": "rademacher", "dtype": "bfloat16"},
    {"engine": "dual", "queries": 3, "dtype": "float16", "lr": "1e-3"},
    *({"groups": "batch", "lr": "1e-3", "dtype": dtype} for dtype in ("float32", "bfloat16")),
    {"groups": 2, "queries": 2, "rank": 2, "lr": "1e-3", "dtype": "bfloat16", "batch_size": 8},
    {"groups": "batch", "lr": "1e-3", "dtype": "bfloat16", "fold_every": 2},
    {"fold_every": 3, "dtype": "bfloat16", "eval_every": 3},
    {"method": "zo-sgd-mmt", "lr": "1e-3", "dtype": "bfloat16"},
    {"method": "zo-adam", "lr": "1e-3", "dtype": "bfloat16"},
    {"method": "zo-sgd-sign", "lr": "1e-4"},
    {"method": "zo-sgd-cons", "dtype": "bfloat16"},
    {"dtype": "bfloat16", "rounding": "compensated"},
    {"weight_decay": 0.5, "dtype": "bfloat16"},
    {"scheme": "lora"},
    {"scheme": "prefix", "lr": "1e-2"},
    {"blocks": "transformer", "lr": "1e-3"},
    {"sparsity": 0.5, "lr": "1e-3"},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CUDA_RUNS, ids=lambda c: "-".join(map(str, c.values())))
def test_on_cuda_a_replay_gives_the_bits_of_a_run_of_captured_steps(material, tmp_path, changes, capsys):
    done = train(material, tmp_path / "run", device="cuda", steps=12, **changes)
    at = ["--until", "last"]
    assert replay(material, tmp_path / "again", done / "trajectory.zot", "--device", "cuda") == 0
    assert "bit for bit" in capsys.readouterr().out
    assert same_weights(done / "model", tmp_path / "again")
    assert replay(material, tmp_path / "here", done / "trajectory.zot", *at) == 0  # on the CPU
    assert "within rounding" in capsys.readouterr().out
    assert replay(material, tmp_path / "there", done / "trajectory.zot", *at, "--device", "cuda") == 0
    first, second = (load_file(next((tmp_path / n).glob("*.safetensors"))) for n in ("here", "there"))
    step = {"bfloat16": 2**-7, "float16": 2**-10}.get(str(changes.get("dtype")), 2**-20)
    for name in first:  # after 12 roundings, each of which may fall the other way, of numbers as large as the tensor's
        atol = 12 * step * float(first[name].float().abs().mean()) + 2e-5
        torch.testing.assert_close(first[name].float(), second[name].float(), rtol=12 * step, atol=atol)


@pytest.mark.gpu
def test_a_run_of_the_cpu_is_replayed_on_cuda_within_rounding_and_another_base_is_not(material, tmp_path, capsys):
    done = train(material, tmp_path / "run", scheme="lora", lr="1e-3")
    assert replay(material, tmp_path / "again", done / "trajectory.zot", "--device", "cuda") == 0
    assert "within rounding (device was cpu" in capsys.readouterr().out
    first, second = (load_file(p / "adapter_model.safetensors") for p in (done / "model", tmp_path / "again"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)
    tiny.causal_model(seed=1).save_pretrained(shutil.copytree(material[0], tmp_path / "other"))
    assert replay((tmp_path / "other", None), tmp_path / "x", done / "trajectory.zot", "--device", "cuda") == 2
    assert "its weights differ" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"groups": "batch", "lr": "1e-3"}, {"method": "zo-adam", "lr": "1e-3"}])
def test_on_cuda_deterministic_runs_repeat_to_the_bit(material, tmp_path, changes):
    """In one process: cuBLAS reads its workspace's size when it is first used, which may have been before."""
    first, second = (
        train(material, tmp_path / n, device="cuda", dtype="bfloat16", deterministic=True, **changes)
        for n in ("a", "b")
    )
    assert same_weights(first / "model", second / "model")
    assert read_file(first / "trajectory.zot").records.data == read_file(second / "trajectory.zot").records.data


def test_any_step_can_be_had(material, tmp_path, capsys):
    done = train(material, tmp_path / "run", steps=6, eval_every=6)
    short = train(material, tmp_path / "short", steps=3, eval_every=3)
    assert replay(material, tmp_path / "three", done / "trajectory.zot", "--until", "3") == 0
    assert same_weights(short / "model", tmp_path / "three")
    assert replay(material, tmp_path / "last", done / "trajectory.zot", "--until", "last") == 0
    assert same_weights(done / "model", tmp_path / "last")
    capsys.readouterr()
    assert replay(material, tmp_path / "x", done / "trajectory.zot", "--until", "7") == 2
    assert "holds 0 to 6" in capsys.readouterr().err
    assert replay(material, tmp_path / "last", done / "trajectory.zot") == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 500_000),
        ({"lr_schedule": "linear"}, 500_000),
        ({"method": "zo-adam", "lr": "1e-3"}, 500_000),
        ({"weight_decay": 0.1}, 510_000),  # two groups, an lr each
        ({"queries": 16}, 1_800_000),
        ({"groups": "batch", "batch_size": 16}, 1_800_000),
        ({"groups": 4, "queries": 4, "batch_size": 16, "lr_schedule": "linear"}, 1_800_000),
    ],
)
def test_20000_steps_as_train_records_them_are_small(material, tmp_path, changes, limit):
    header = read_file(train(material, tmp_path / "run", steps=1, eval_every=1, **changes) / "trajectory.zot").header
    assert header.pairs == (16 if limit == 1_800_000 else 1)
    assert len(header.encode()) + 20_001 * header.record_size <= limit


@pytest.mark.parametrize("scheme", ["full", "lora", "prefix", "prompt", "head"])
@pytest.mark.parametrize("kind", ["masked", "classifier"])
def test_eval_of_a_trajectory_is_the_run_s_own_test(tmp_path, kind, scheme):
    """Heads and adapters that no checkpoint has are made again from the run's seed, not eval's."""
    model, data = families.save("bert", tmp_path / "bert"), tiny.save_data(tmp_path / "data")
    common = {"model_kind": kind, "loss": "candidates", "seed": 7, "lr": "1e-3", "steps": 2}
    done = train((model, data), tmp_path / "run", scheme=scheme, **common)
    asked = ["--data", str(data), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS, "--device", "cpu"]
    flags = ["--model", str(model), "--trajectory", str(done / "trajectory.zot"), "--seed", "3"]
    assert run(["eval", *flags, *asked, "--output", str(tmp_path / "f.json")]) == 0
    value = json.loads((tmp_path / "f.json").read_text())["value"]
    assert value == json.loads((done / "result.json").read_text())["test_after"]


def test_a_trajectory_is_scored_without_a_saved_model(material, tmp_path, capsys):
    done = train(material, tmp_path / "run")
    common = ["--data", str(material[1]), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS, "--device", "cpu"]
    figures = []
    for which in (
        ["--model", str(done / "model")],
        ["--model", str(material[0]), "--trajectory", str(done / "trajectory.zot")],
    ):
        assert run(["eval", *which, *common, "--output", str(tmp_path / "f.json")]) == 0
        figures.append((tmp_path / "f.json").read_text())
    assert figures[0] == figures[1]


def test_another_base_model_is_refused(material, tmp_path, capsys):
    done = train(material, tmp_path / "run")
    other = shutil.copytree(material[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert replay((other, None), tmp_path / "out", done / "trajectory.zot") == 2
    assert "its weights differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_changed_base_is_refused_on_another_device_too(material, tmp_path, capsys, monkeypatch):
    done = train(material, tmp_path / "run", scheme="lora")
    other = tiny.causal_model(seed=1)
    other.save_pretrained(shutil.copytree(material[0], tmp_path / "other"))
    monkeypatch.setattr(replays, "machine", lambda device: {"device": "another", "torch": "9"})
    assert replay((tmp_path / "other", None), tmp_path / "out", done / "trajectory.zot") == 2
    assert "its weights differ" in capsys.readouterr().err
    assert replay(material, tmp_path / "out", done / "trajectory.zot") == 0
    line = capsys.readouterr().out
    assert "within rounding" in line
    assert "is another" in line


BASE: dict[str, object] = {"name": "m", "scheme": "full", "kind": "causal", "labels": [], "machine": {}}
OPTIONS: dict[str, object] = {"eps": 1e-3, "queries": 1, "groups": 1, "rank": 1}
STRANGE: list[dict[str, object]] = [
    *(
        {"base": BASE | {key: value}}
        for key in BASE
        for value in (3, [3], {"a": {}})
        if not (key == "machine" and value == {"a": {}})
    ),
    {"base": BASE | {"kind": "odd"}},
    {"base": BASE | {"scheme": "odd"}},
    {"base": BASE | {"sha256": 5}},
    {"base": BASE | {"start": "0"}},
    *({"dtype": name} for name in ("odd", "auto", "float64")),
    *({"method_options": OPTIONS | {"queries": value}} for value in (10**9, 2, 0, "3", True)),
    *(
        {"method_options": OPTIONS | {key: "x"}}
        for key in ("eps", "lr", "self", "params", "blocks", "fold_every", "g_clip")
    ),
    {"method_options": OPTIONS | {"estimator": [1]}},
    {"method_options": OPTIONS | {"sparsity": 0.5, "mask": "wanda"}},
    *({"method": name} for name in ("fo-adam", "\x1b[31m")),
    {"direction": "up"},
    {"engine": "warp"},
    {"decay": (0.1,)},
    {"seed": 2**64 - 1},
    {"groups": 3},
]


def test_a_strangers_header_is_refused_in_a_line(material, tmp_path, capsys):
    """With right check sums: what a file says beside its numbers is checked before it is used."""
    fair = Header(1, "gaussian", "zo-sgd", 0, 5, method_options=OPTIONS, base=BASE, engine="sequential")
    for n, changes in enumerate([{}, *STRANGE]):
        path = tmp_path / f"{n}.zot"
        with TrajectoryWriter.create(path, dataclasses.replace(fair, **changes)) as writer:
            writer.mark_chosen(0)
        code = replay(material, tmp_path / "out", path)
        said = capsys.readouterr().err
        assert code == (2 if changes else 0), (changes, said)
        if changes:
            assert said.count("\n") == 1, changes
            assert "\x1b" not in said
            assert len(said) < 500


def test_what_a_stranger_writes_is_shown_as_plain_text(material, tmp_path, capsys):
    base = BASE | {"name": "m\x1b[2J\n\n# <script>", "machine": {"device": "|\n# b"}}
    more = {"engine": "sequential", "task": "<b>|*x*", "extra": {"command": "`\n#"}}
    header = Header(1, "gaussian", "zo-sgd", 0, 5, method_options=OPTIONS, base=base, **more)
    with TrajectoryWriter.create(tmp_path / "t.zot", header) as writer:
        writer.mark_chosen(0)
    assert replay(material, tmp_path / "out", tmp_path / "t.zot") == 0
    line = capsys.readouterr().out
    assert len(line.splitlines()) == 2
    assert "\x1b" not in line
    card = (tmp_path / "out" / "README.md").read_text()
    assert [row for row in card.splitlines() if row.startswith("#")] == ["# Rebuilt from a trajectory"]
    assert "<" not in card
    assert "\\|\\*x\\*" in card
    with TrajectoryWriter.create(
        tmp_path / "u.zot", dataclasses.replace(header, base=base | {"sha256": "0"})
    ) as writer:
        writer.mark_chosen(0)
    assert replay(material, tmp_path / "other", tmp_path / "u.zot") == 2
    said = capsys.readouterr().err
    assert "its weights differ" in said
    assert "\x1b" not in said


def test_only_a_saved_model_is_replaced_and_only_by_a_whole_one(material, tmp_path, capsys, monkeypatch):
    done = train(material, tmp_path / "run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    assert replay(material, mine, done / "trajectory.zot", "--overwrite") == 2
    assert "a saved model, which this is not" in capsys.readouterr().err
    assert (mine / "thesis.tex").read_text() == "mine"
    assert replay(material, tmp_path / "out", done / "trajectory.zot") == 0
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(
            "zotune.cli.replay.rebuilt_card", lambda *of: (_ for _ in ()).throw(OSError(28, "no space left"))
        )
        assert replay(material, tmp_path / "out", done / "trajectory.zot", "--overwrite") == 1
    assert "cannot be written (no space left)" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert replay(material, tmp_path / "out", done / "trajectory.zot", "--overwrite") == 0


def test_a_file_without_its_end_says_how_much_of_the_run_it_has(material, tmp_path, capsys):
    done = train(material, tmp_path / "run")
    data, header = (done / "trajectory.zot").read_bytes(), read_file(done / "trajectory.zot").header
    (tmp_path / "torn.zot").write_bytes(data[: -header.record_size - 5])
    assert replay(material, tmp_path / "out", tmp_path / "torn.zot") == 2
    assert "5 of 6 steps are here, and a torn one" in capsys.readouterr().err
    assert replay(material, tmp_path / "out", tmp_path / "torn.zot", "--until", "last") == 0
    said = capsys.readouterr().out
    assert "its last record is torn (16 bytes) and left out" in said
    assert "step 5 of 6" in said


def test_the_cards_say_what_the_run_was(material, tmp_path):
    done = train(material, tmp_path / "run", save_every=3)
    assert replay(material, tmp_path / "out", done / "trajectory.zot") == 0
    result = json.loads((done / "result.json").read_text())
    for card in (done / "README.md", done / "model" / "README.md", tmp_path / "out" / "README.md"):
        text = card.read_text()
        assert all(word in text for word in ("zo-sgd", "zotune train", str(material[0].name), "data", "--lr 0.01")), (
            card
        )
    text = (done / "README.md").read_text()
    assert f"{result['test_before']:.1f} before, {result['test_after']:.1f} after" in text
    assert f"zotune replay --model {material[0]} --trajectory trajectory.zot --output model" in text


def test_damage_and_other_noise_are_refused(material, tmp_path, capsys, monkeypatch):
    done = train(material, tmp_path / "run")
    bytes_ = bytearray((done / "trajectory.zot").read_bytes())
    bytes_[-60] ^= 1
    (tmp_path / "bad.zot").write_bytes(bytes_)
    assert replay(material, tmp_path / "out", tmp_path / "bad.zot") == 2
    assert "check sum" in capsys.readouterr().err
    assert replay(material, tmp_path / "out", tmp_path / "bad.zot", "--until", "1") == 0
    monkeypatch.setattr(noise, "NOISE_VERSION", 2)
    capsys.readouterr()
    assert replay(material, tmp_path / "out2", done / "trajectory.zot") == 2
    assert "noise definition 1" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"groups": 3, "engine": "lowrank"}], ids=["dense", "lowrank"])
def test_a_replay_folds_where_the_record_says_that_the_run_folded(options):
    draw = torch.Generator().manual_seed(0)
    start, pairs = torch.randn(40, 30, generator=draw).bfloat16(), options.get("groups", 1)
    g_SP = torch.randn(6, pairs, generator=draw).tolist()
    steps = [Record(s, 1.0, 1.0, tuple(g_P), (1e-2,), (0.0,)) for s, g_P in enumerate(g_SP)]
    forced = [dataclasses.replace(record, folded=record.step % 2 == 1) for record in steps]
    found = {}
    for name, every, records in (("asked", 2, steps), ("forced", 100, forced), ("never", 100, steps)):
        param = torch.nn.Parameter(start.clone())
        replays.apply(ZeroOrderOptimizer([("w", param)], seed=1, fold_every=every, **options), records)
        found[name] = param.data
    assert torch.equal(found["asked"], found["forced"])
    assert torch.equal(found["never"], start)
    assert not torch.equal(found["asked"], start)


@pytest.mark.parametrize("direction", noise.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_steps_in_a_pass_are_the_steps_one_by_one(direction, dtype, monkeypatch):
    monkeypatch.setattr(noise, "STEPS_PART", 1000)
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(71, 73, generator=draw).to(dtype)
    seeds, coefs = torch.randint(1 << 40, (5, 2), generator=draw), torch.randn(5, 2, generator=draw) / 100
    one_by_one = w.clone()
    for seeds_Q, coefs_Q in zip(seeds, coefs, strict=True):
        noise.add_noise(one_by_one, one_by_one, seeds_Q, coefs_Q, 7, direction)
    noise.add_noise_steps(w, seeds, coefs, 7, direction)
    assert torch.equal(w, one_by_one)
    exact = torch.zeros(71, 73, dtype=torch.float64)
    reference.add_noise(exact, exact, seeds.view(-1), coefs.view(-1), 7, direction)
    assert exact.abs().max() > 0
