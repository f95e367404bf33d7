"""`zotune` as its users run it, on a tiny model with a real tokenizer and separable texts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import yaml

import zotune
from zotune.cli.app import run
from zotune.record.trajectory import read_file

KEYS = {
    "metric", "test_before", "test_after", "steps", "chosen_step", "resumed_at", "forward_passes", "trainable_parameters",
    "wall_seconds", "peak_memory_bytes", "method", "scheme", "model", "task", "seed", "versions",
}  # fmt: skip
WORDS = '{"0": "bad", "1": "good"}'


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    corpus = ["the film was good and bad, a great terrible day It was good It was bad"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, size in (("train", 60), ("validation", 20), ("test", 30)):
        rows = []
        for i in range(size):
            filler = " ".join(draw.choice(["the", "film", "day", "was", "a"]) for _ in range(draw.randrange(2, 6)))
            rows.append({"text": f"{filler} {'great' if i % 2 else 'terrible'}", "label": i % 2})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def flags(model, data):
    """The flags of a short run."""
    return [
        "--model", str(model), "--data", str(data), "--template", "{text} It was", "--label-words", WORDS,
        "--steps", "6", "--eval-every", "2", "--log-every", "1", "--batch-size", "4", "--lr", "1e-2", "--device", "cpu",
    ]  # fmt: skip


def weights(folder: Path) -> bytes:
    return next(folder.glob("model/*.safetensors")).read_bytes()


def lines(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "step_seconds")} for line in read]


def refused(capsys, *argv: str, code: int = 2) -> str:
    """The one line (or lines) with which a command is refused."""
    assert run(list(argv)) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_leaves_what_the_contract_names(flags, tmp_path, capsys, scheme, dtype, model, data):
    out = tmp_path / "run"
    assert run(["train", *flags, "--output", str(out), "--scheme", scheme, "--dtype", dtype]) == 0
    assert "engine dual: one forward gives all losses" in capsys.readouterr().err
    result = json.loads((out / "result.json").read_text())
    assert result.keys() >= KEYS
    assert (result["steps"], result["forward_passes"], result["task"]) == (6, 12, data.name)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(line["loss"], float) for line in lines(out))
    validation = {line["step"]: line["validation_accuracy"] for line in lines(out) if "validation_accuracy" in line}
    best = max(validation.values())
    assert result["chosen_step"] == max(step for step, value in validation.items() if value == best)
    trajectory = read_file(out / "trajectory.zot")
    assert trajectory.complete
    assert trajectory.chosen_step == result["chosen_step"]
    assert len(trajectory.records) == 6
    assert yaml.safe_load((out / "config.yaml").read_text())["dtype"] == dtype
    assert not list(out.glob("checkpoint-*"))

    if scheme == "full":
        again = tf.AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
        assert str(again.dtype) == f"torch.{dtype}"
        where = ["--model", str(out / "model")]
    else:
        where = ["--model", str(model), "--adapter", str(out / "model"), "--dtype", dtype]
        assert result["trainable_parameters"] == 2 * (8 * (32 + 32) + 8 * (32 + 16))
    score = tmp_path / "score.json"
    assert run(["eval", *where, *flags[2:8], "--output", str(score)]) == 0
    figures = json.loads(score.read_text())
    assert figures == {"task": data.name, "metric": "accuracy", "value": result["test_after"], "n": 30, "split": "test"}
    capsys.readouterr()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(flags, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run(["train", *flags, "--seed", seed, "--output", str(tmp_path / name)]) == 0
    a, b, c = (tmp_path / name for name in "abc")
    assert weights(a) == weights(b)
    assert lines(a) == lines(b)
    assert (a / "trajectory.zot").read_bytes() == (b / "trajectory.zot").read_bytes()
    assert weights(a) != weights(c)


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_the_trajectory_holds_the_losses_and_gradients_of_several_queries(flags, tmp_path, estimator):
    out = tmp_path / "run"
    assert run(["train", *flags, "--queries", "3", "--estimator", estimator, "--output", str(out)]) == 0
    passes = 6 if estimator == "two-sided" else 4
    assert json.loads((out / "result.json").read_text())["forward_passes"] == 6 * passes
    for record, line in zip(read_file(out / "trajectory.zot").records, lines(out), strict=True):
        rounding = 2.0**-24 * max(map(abs, record.g))  # each g is kept in float32; their sum may cancel
        assert sum(record.g) / 3 == pytest.approx(line["projected_gradient"], rel=0, abs=rounding)
        middle = (record.loss_plus + record.loss_minus) / 2 if estimator == "two-sided" else record.loss_minus
        assert middle == pytest.approx(line["loss"], rel=1e-6)


def test_micro_batches_make_the_batch(flags, tmp_path):
    assert run(["train", *flags, "--output", str(tmp_path / "one")]) == 0
    flags[flags.index("--batch-size") + 1] = "2"
    assert run(["train", *flags, "--accumulate", "2", "--output", str(tmp_path / "two")]) == 0
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_training_learns(flags, tmp_path):
    """The word that decides stands last, so that a model of two layers that starts from nothing can learn it in 400 steps."""
    for flag, value in (
        ("--steps", "400"),
        ("--eval-every", "200"),
        ("--batch-size", "8"),
        ("--lr", "3e-3"),
        ("--template", "{text}"),
    ):
        flags[flags.index(flag) + 1] = value
    assert run(["train", *flags, "--loss", "candidates", "--eps", "1e-2", "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_before"] == 50.0
    assert result["test_after"] >= 80


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "expected: "),
        (["--blocks", "linear"], "expected: not known (no estimate of --blocks linear)"),
        (["--loss", "accuracy"], "expected: not known (no estimate of --loss accuracy)"),
    ],
)
def test_what_a_run_takes_is_told_before_it_or_why_it_is_not_known(flags, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert run(["train", *flags, *more, "--output", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("expected:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert ("not known" in lines[0]) == bool(more)
    assert ("alone; the machine is busy (load 99.0 on" in lines[0]) != bool(more)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bits_of_a_whole_one(flags, tmp_path):
    """SIGKILL after the first checkpoint; then SIGTERM, whose exit code says so; then to the end."""
    flags[flags.index("--steps") + 1] = "60"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(["train", *flags, "--output", str(whole)]) == 0
    command = [sys.executable, "-m", "zotune", "train", *flags, "--output", str(cut), "--resume"]
    slow = {"ZOTUNE_NOISE_BACKEND": "reference"}  # signs are the same in every backend

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, "--direction", "rademacher"], env=os.environ | slow, stderr=subprocess.PIPE, text=True
        )

    whole_signs = tmp_path / "signs"
    assert run(["train", *flags, "--output", str(whole_signs), "--direction", "rademacher"]) == 0
    process = start()
    wait_for(lambda: any((c / "trainer_state.json").exists() for c in cut.glob("checkpoint-*")), process)
    process.kill()
    process.wait()
    first = len(lines(cut))
    process = start()
    wait_for(lambda: len(lines(cut)) > first + 2, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "--resume" in said
    assert run(["train", *flags, "--output", str(cut), "--resume", "--direction", "rademacher"]) == 0
    assert len(json.loads((cut / "result.json").read_text())["resumed_at"]) == 2
    assert lines(cut) == lines(whole_signs)
    assert weights(cut) == weights(whole_signs)
    assert (cut / "trajectory.zot").read_bytes() == (whole_signs / "trajectory.zot").read_bytes()
    before = weights(cut)
    assert (
        run(["train", *flags, "--output", str(cut), "--resume", "--direction", "rademacher"]) == 0
    )  # finished: nothing to do
    assert weights(cut) == before


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def test_a_folder_with_another_run_or_with_files_is_left_alone(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(["train", *flags, "--output", str(out)]) == 0
    before = weights(out)
    assert "holds a run" in refused(capsys, "train", *flags, "--output", str(out))
    assert "lr was 0.01, is 0.5" in refused(capsys, "train", *flags, "--lr", "0.5", "--output", str(out), "--resume")
    assert weights(out) == before
    assert run(["train", *flags, "--seed", "5", "--output", str(out), "--overwrite"]) == 0
    assert weights(out) != before
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    for extra in ([], ["--overwrite"], ["--resume"]):
        assert "thesis.tex" in refused(capsys, "train", *flags, "--output", str(foreign), *extra)
    assert (foreign / "thesis.tex").read_text() == "precious"


def test_a_locked_folder_is_refused(flags, tmp_path, capsys):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another zotune is running" in refused(capsys, "train", *flags, "--output", str(tmp_path / "run"))


def test_a_run_that_is_refused_late_leaves_no_folder(flags, tmp_path, capsys, monkeypatch):
    from zotune.models import quantized

    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    nf4 = ["--quantize", "nf4", "--scheme", "lora"]
    assert "needs bitsandbytes" in refused(capsys, "train", *flags, *nf4, "--output", str(tmp_path / "runs" / "a"))
    assert not (tmp_path / "runs" / "a").exists()
    (tmp_path / "mine").mkdir()
    assert "needs bitsandbytes" in refused(capsys, "train", *flags, *nf4, "--output", str(tmp_path / "mine"))
    assert (tmp_path / "mine").is_dir()  # which somebody else has made


def test_a_dry_run_takes_no_step_that_is_reckoned_to_be_long(flags, tmp_path, capsys, monkeypatch):
    from zotune.run import timing
    from zotune.step.optimizer import ZeroOrderOptimizer

    def step(*args, **kwargs):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    monkeypatch.setattr(ZeroOrderOptimizer, "step", step)
    many = ["--groups", "batch", "--queries", "32"]
    assert run(["train", *flags, *many, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "s a step)" in capsys.readouterr().out


def test_a_dry_run_tells_what_would_happen_and_writes_nothing(flags, tmp_path, capsys):
    assert run(["train", *flags, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for part in (
        "lr: 0.01",
        "It was",
        "forward passes",
        "12",
        "memory",
        "minutes",
        "dual: one",
        "nothing was written",
    ):
        assert part in said


def test_what_the_first_step_alone_takes_is_not_foretold_of_each(flags, tmp_path, monkeypatch):
    """Compiling takes a hundred seconds of a clock of its own, then a step takes one."""
    from zotune.options import TrainConfig, resolve
    from zotune.prepare.prepared import prepare, resolved
    from zotune.run import timing

    given = dict(zip((flag.strip("-").replace("-", "_") for flag in flags[::2]), flags[1::2], strict=True))
    ready = prepare(resolve(TrainConfig, given | {"output": str(tmp_path / "run")}, None))
    ready.config = resolved(ready)
    sizes, clock = [], [0.0]

    def step(loss_of, batch):
        clock[0] += 1.0 if sizes else 100.0
        sizes.append(len(batch["input_ids"]))

    stepping = SimpleNamespace(step=step, forwards_a_step=2, chosen_engine="any")
    monkeypatch.setattr(timing, "optimizer_for", lambda ready: stepping)
    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    assert timing.timed(ready)[0] == 1.0
    assert sizes == [1, *[ready.config.batch_size] * 3]


def test_a_loss_that_is_not_finite_stops_with_1_and_finite_weights(flags, tmp_path, capsys, model):
    broken = tmp_path / "broken"
    m = tf.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        m.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    m.save_pretrained(broken)
    tf.AutoTokenizer.from_pretrained(model).save_pretrained(broken)
    flags[1] = str(broken)
    assert "not finite" in refused(capsys, "train", *flags, "--output", str(tmp_path / "run"), code=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--template", "{txt} It was"], r"no field 'txt' (has 'text', 'label')"),
        (["--template", "It was"], "names no field"),
        (["--label-field", "target"], "no field 'target'"),
        (["--label-words", '{"0": "bad", "7": "good"}'], "label '1' has no word"),
        (["--label-words", "{bad"], "not JSON"),
        (["--data", "nowhere/at/all"], "no such file or folder"),
        (["--model", "./nowhere"], "no such folder"),
        (["--method", "zo-sdg"], "did you mean 'zo-sgd'?"),
        (["--scheme", "lorra"], "did you mean 'lora'?"),
        (["--steps", "0"], "--steps"),
        (["--gguf-file", "x.gguf"], "x.gguf"),
        (["--max-length", "1"], "leaves no room"),
        (["--nonsense", "1"], "--nonsense"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(flags, tmp_path, capsys, change, message):
    said = refused(capsys, "train", *flags, "--output", str(tmp_path / "run"), *change)
    assert message in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_bad_files_are_named_with_their_line(flags, tmp_path, capsys, data):
    def refuse(text: str, name: str = "train.jsonl") -> str:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_text(text)
        flags[flags.index("--data") + 1] = str(folder)
        return refused(capsys, "train", *flags, "--output", str(tmp_path / "run"))

    row = '{"text": "a", "label": 0}\n'
    assert "train.jsonl:2: not a JSON object" in refuse(row + "{oops\n")
    assert "train.jsonl:2: a list where a JSON object" in refuse(row + "[]\n")
    assert "no rows" in refuse("")
    assert "train.csv:3" in refuse("text,label\na,0\nb,c,d\n", "train.csv")
    assert "no train.jsonl" in refuse(row, "validation.jsonl")
    assert "tokens, the model takes 64" in refuse(('{"text": "' + "film " * 90 + '", "label": 0}\n') * 3)
    assert "no field 'label'" in refuse('{"text": "a"}\n' * 3)


def test_yaml_holds_the_same_keys_flags_win_and_all_errors_come_at_once(flags, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    keys = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    keys |= {"label_words": {0: "bad", 1: "good"}, "output": str(tmp_path / "run"), "steps": 4}
    file.write_text(yaml.safe_dump(keys))
    assert run(["train", "--config", str(file), "--steps", "2"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    file.write_text(yaml.safe_dump(keys | {"bach_size": 3, "lr": "fast", "dtype": "float23"}))
    said = refused(capsys, "train", "--config", str(file), "--queries", "x")
    for part in ("'bach_size'; did you mean 'batch_size'?", "lr: 'fast'", "did you mean 'float32'?", "--queries: 'x'"):
        assert part in said
    file.write_text("steps: 4\nlr: 1.0e-3\ntask:\n  name: own\nlr: 1.0e-5\n")
    assert "run.yaml:5: key 'lr' is there twice" in refused(capsys, "train", "--config", str(file))
    assert "--output: a blank is no name" in refused(capsys, "train", *flags, "--output", " ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--method", "fo-adam", "--eps", "1e-3", "--direction", "rademacher"],
            ["--eps 1e-3", "--direction rademacher"],
        ),
        (["--method", "forward-grad", "--eps", "1e-3", "--direction", "rademacher"], ["--eps 1e-3"]),
        (["--method", "zo-sgd", "--eps", "1e-3", "--direction", "rademacher"], []),
        (["--method", "fo-sgd"], []),
    ],
)
def test_what_a_method_has_no_use_for_is_said(flags, given, said, tmp_path, caplog):
    assert run(["train", *flags, *given, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    lines = [r.getMessage() for r in caplog.records if "does not use it" in r.getMessage()]
    assert lines == [f"{what}: method {given[1]} does not use it" for what in said]


def test_predict_labels_rows_in_order_and_merge_keeps_the_logits(flags, tmp_path, model):
    out = tmp_path / "run"
    assert run(["train", *flags, "--scheme", "lora", "--lr", "0.1", "--output", str(out)]) == 0
    rows = [{"text": f"the film {i}"} for i in range(7)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--template", "{text} It was", "--label-words", WORDS, "--data", str(tmp_path / "new.jsonl")]
    assert (
        run(
            [
                "predict",
                "--model",
                str(model),
                "--adapter",
                str(out / "model"),
                *common,
                "--output",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    assert (
        run(["merge", "--model", str(model), "--adapter", str(out / "model"), "--output", str(tmp_path / "merged")])
        == 0
    )
    assert run(["predict", "--model", str(tmp_path / "merged"), *common, "--output", str(tmp_path / "b")]) == 0
    a, b = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab")
    assert len(a) == 7
    for x, y in zip(a, b, strict=True):
        assert x["label"] == max(x["scores"], key=x["scores"].get)
        assert x["scores"] == pytest.approx(y["scores"], abs=1e-5)


def test_lists_name_what_there_is(capsys):
    for kind, name in (("methods", "zo-sgd"), ("schemes", "lora"), ("tasks", "sst2"), ("engines", "sequential")):
        assert run(["list", kind]) == 0
        assert name in capsys.readouterr().out
    assert "did you mean 'methods'?" in refused(capsys, "list", "method")
    assert run(["env"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_help_and_import_load_no_torch():
    code = (
        "import sys, zotune, zotune.cli.app as a; a.run(['train', '--help']); "
        "print([m for m in ('torch', 'triton', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_the_version_is_told(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"zotune {zotune.__version__}\n"


def test_nothing_asked_for_is_answered_with_the_help(capsys):
    assert run([]) == 2
    said = capsys.readouterr().err
    assert said.lstrip().startswith("Usage:")
    assert "zotune: " not in said
    assert "Fine-tune a model" in said


REFUSED = {
    "groups": (["--groups", "batch", "--method", "zo-adam"], "low-rank directions do not serve"),
    "folds": (["--method", "fo-sgd", "--fold-every", "2"], "fold_every=2: only updates that are lists"),
    "tracker": (["--report-to", "nothing"], "--report-to nothing: "),
    "data": (["--data", "nowhere"], "--data nowhere: no such file or folder"),
}


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "run"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_a_line_and_leaves_no_run_behind(kind, dry, flags, tmp_path, capsys):
    more, said = REFUSED[kind]
    assert run(["train", *flags, *more, "--output", str(tmp_path / "run"), *["--dry-run"] * dry]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zotune: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_overwrite_deletes_nothing(kind, flags, tmp_path):
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    before = weights(tmp_path / "run")
    assert run(["train", *flags, *REFUSED[kind][0], "--output", str(tmp_path / "run"), "--overwrite"]) == 2
    assert weights(tmp_path / "run") == before
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "fo-adam", "--queries", "4"], "--queries: method 'fo-adam' has no option 'queries'"),
        (["--seed", str(2**32)], "--seed: "),
        (["--rank", "8"], "--rank: rank=8: of low-rank directions"),
        (["--alignment", "none"], "--alignment none: of built-in tasks"),
    ],
)
def test_the_option_that_is_wrong_is_the_one_that_is_named(more, said, flags, tmp_path, capsys):
    assert run(["train", *flags, *more, "--output", str(tmp_path / "run")]) == 2
    assert f"zotune: {said}" in capsys.readouterr().err


def test_a_run_s_options_serve_eval_and_its_folder_is_no_file_of_figures(flags, tmp_path, capsys):
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    given = ["--config", str(tmp_path / "run" / "config.yaml"), "--model", str(tmp_path / "run" / "model")]
    assert run(["eval", *given]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert run(["eval", *given, "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_card_s_commands_are_quoted(flags, model, tmp_path):
    place = tmp_path / "a model"
    place.symlink_to(model)
    assert run(["train", *flags, "--model", str(place), "--output", str(tmp_path / "a run")]) == 0
    card = (tmp_path / "a run" / "README.md").read_text()
    assert f"zotune replay --model '{place}' --trajectory" in card


def test_a_template_of_two_lines_is_one_cell_of_the_card(flags, tmp_path):
    at = flags.index("--template")
    flags[at + 1] = "{text}\nIt | was"
    assert run(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| task |")]
    assert "`{text}\\nIt \\| was`" in row
    assert row.endswith(" |")
