"""What a `ZOTrainer` is told has its effect, or is refused at construction in one line."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from test_trainer import ROWS, StopsAt, collate, model, row_loss, same, train
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_pt_utils import LabelSmoother

from zotune import ZeroOrderOptimizer, ZOTrainer, ZOTrainingArguments
from zotune.errors import InputError, NonFiniteLoss, NotFinite
from zotune.trainer.outputs import Outputs
from zotune.trainer.refusals import REFUSED

GIVEN = {
    "fp16": True, "max_grad_norm": 0.5, "optim": "sgd", "optim_args": "a=1", "optim_target_modules": ["q_proj"], "adam_beta1": 0.8,
    "adam_beta2": 0.9, "adam_epsilon": 1e-6, "neftune_noise_alpha": 5.0, "torch_compile": True, "torch_compile_backend": "eager",
    "torch_compile_mode": "default", "use_liger_kernel": True, "activation_checkpointing": True, "gradient_checkpointing": True,
    "torch_empty_cache_steps": 1, "auto_find_batch_size": True, "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard", "parallelism_config": object(),
}  # fmt: skip
NEEDS_MORE = ("deepspeed", "fsdp", "parallelism_config")  # than transformers' own class takes here


def trainer(tmp_path, trained=None, kind=ZOTrainingArguments, zo=None, **options):
    args = kind(
        output_dir=str(tmp_path), **{
            "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
            "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        } | options,
    )  # fmt: skip
    given = {"train_dataset": ROWS, "data_collator": collate} | (zo or {})
    return ZOTrainer(
        model=None if "model_init" in given else model() if trained is None else trained, args=args, **given
    )


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 200


def test_each_argument_that_a_step_would_ignore_is_tried_and_named_in_the_docstring():
    assert set(GIVEN) == set(REFUSED)
    said = ZOTrainingArguments.__doc__ or ""
    assert all(f"`{name}`" in said or name.startswith("torch_compile_") for name in REFUSED)


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_that_a_step_would_ignore_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"^{name}=") as error:
        trainer(tmp_path, **{name: GIVEN[name]})
    assert one_line(error)


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in NEEDS_MORE])
def test_so_it_is_in_plain_arguments(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tf.training_args, "is_torch_bf16_gpu_available", lambda: True)
    stands_for = {"gradient_checkpointing": "activation_checkpointing"}.get(name, name)
    if name.startswith("torch_compile_"):
        stands_for = "torch_compile"
    with pytest.raises(InputError, match=f"^{stands_for}") as error:
        trainer(tmp_path, kind=tf.TrainingArguments, **{name: GIVEN[name]})
    assert one_line(error)


def test_defaults_of_plain_arguments_are_not_taken_for_wishes(tmp_path):
    told = trainer(tmp_path, kind=tf.TrainingArguments, max_grad_norm=tf.TrainingArguments.max_grad_norm)
    assert told.args.max_grad_norm == 0


@pytest.mark.parametrize("which", ["optimizer", "scheduler", "class", "function", "smoothing"])
def test_what_would_not_be_asked_for_a_step_is_refused(tmp_path, which):
    trained, options = model(), {}
    adam = torch.optim.AdamW(trained.parameters())
    if which == "smoothing":
        options["label_smoothing_factor"] = 0.1
    zo = {
        "optimizer": {"optimizers": (adam, None)},
        "scheduler": {"optimizers": (None, LambdaLR(adam, lambda step: 1.0))},
        "class": {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {})},
        "function": {"row_loss": row_loss, "compute_loss_func": lambda *args, **kwargs: 0.0},
        "smoothing": {"row_loss": row_loss},
    }[which]
    names = {"function": "compute_loss_func", "smoothing": "label_smoothing_factor"}
    with pytest.raises(InputError, match=f"^{names.get(which, 'optimizers')}") as error:
        trainer(tmp_path, trained, zo=zo, **options)
    assert one_line(error)


def test_an_optimizer_given_by_position_is_refused_too(tmp_path):
    trained = model()
    args = ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    adam = torch.optim.AdamW(trained.parameters())
    with pytest.raises(InputError, match=r"^optimizers: AdamW"):
        ZOTrainer(trained, args, collate, ROWS, None, None, None, None, None, None, (adam, None))


@pytest.mark.parametrize("how", ["subclass", "put there"])
def test_an_optimizer_of_gradients_that_comes_later_is_refused_at_the_first_step(tmp_path, how):
    """It would be asked for steps, and find no gradient: a run that trains nothing."""

    class Own(ZOTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    args = ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=2)
    told = (Own if how == "subclass" else ZOTrainer)(model(), args, train_dataset=ROWS, data_collator=collate)
    if how == "put there":
        told.optimizer = torch.optim.AdamW(told.model.parameters())
    with pytest.raises(InputError, match=r"^optimizer: AdamW steps by gradients") as error:
        told.train()
    assert one_line(error)


def test_compiled_models_are_refused(tmp_path):
    inner = model()
    inner.model.layers[0].compile()
    whole = model()
    whole.compile()
    for compiled in (torch.compile(model()), inner, whole):
        with pytest.raises(InputError, match=r"^model: .*compiled") as error:
            trainer(tmp_path, compiled)
        assert one_line(error)
    with pytest.raises(InputError, match=r"^model: DataParallel"):
        trainer(tmp_path, torch.nn.DataParallel(model()))


def test_several_processes_that_have_no_group_are_refused(tmp_path, monkeypatch):
    args = ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(ZOTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(InputError, match=r"^2 processes: torch.distributed has no group") as error:
        ZOTrainer(model(), args, train_dataset=ROWS, data_collator=collate)
    assert one_line(error)


def test_one_of_several_gpus_trains_and_that_is_said(tmp_path, caplog):
    args = ZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    ZOTrainer(model(), args, train_dataset=ROWS, data_collator=collate)
    assert args.n_gpu == 1
    assert "one of 2 GPUs trains" in caplog.text


class Batches:
    """Collates, and keeps what it has collated."""

    def __init__(self):
        self.seen = []

    def __call__(self, rows):
        self.seen.append(collate(rows))
        return collate(rows)


def by_hand(batches, loss):
    """Eight steps of the optimizer itself on the batches that a Trainer saw."""
    trained = model().eval()
    optimizer = ZeroOrderOptimizer(trained, method="zo-sgd", lr=1e-3, eps=1e-3, seed=42)
    for batch in batches.seen[:8]:
        optimizer.step(lambda batch=batch: loss(trained, batch))
    return trained


def test_bf16_is_autocast_over_float32_weights(tmp_path):
    batches = Batches()
    told = trainer(tmp_path, zo={"data_collator": batches}, bf16=True)
    told.train()

    def loss(trained, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return trained(**batch).loss

    assert same(told.model, by_hand(batches, loss))
    assert not same(told.model, by_hand(batches, lambda trained, batch: trained(**batch).loss))
    assert all(p.dtype == torch.float32 for p in told.model.parameters())


def test_label_smoothing_is_what_a_step_goes_down(tmp_path):
    batches = Batches()
    told = trainer(tmp_path, zo={"data_collator": batches}, label_smoothing_factor=0.3)
    told.train()
    smoother = LabelSmoother(epsilon=0.3)

    def loss(trained, batch):
        counted = (batch["labels"][:, 1:] != -100).sum()
        outputs = trained(input_ids=batch["input_ids"])
        return smoother(outputs, batch["labels"], shift_labels=True, num_items_in_batch=counted)

    expected = by_hand(batches, loss)
    moved = max((p - q).abs().max() for p, q in zip(expected.parameters(), model().parameters(), strict=True))
    apart = max((p - q).abs().max() for p, q in zip(expected.parameters(), told.model.parameters(), strict=True))
    assert apart < 0.01 * moved


def test_a_loss_that_says_it_is_a_mean_a_micro_batch_is_averaged(tmp_path):
    class Own(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    class Mean(Own):
        loss_is_scaled_for_ga = False

    said = {}
    for kind in (Own, Mean):
        args = ZOTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
            report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        told = kind(model=model(), args=args, train_dataset=ROWS, data_collator=collate)
        told.train()
        said[kind] = told.state.log_history[0]["loss"]
    assert said[Own] == pytest.approx(2 * said[Mean], rel=1e-3)


def test_each_run_of_a_model_init_moves_its_own_model_by_its_own_losses(tmp_path):
    told = trainer(tmp_path, zo={"model_init": lambda trial=None: model(), "row_loss": row_loss})
    told.train()
    first = copy.deepcopy(told.model)
    told.train()
    assert same(first, told.model)
    assert not same(first, model())


def test_each_trial_of_a_search_has_its_own_eps_method_and_rate(tmp_path):
    told = trainer(
        tmp_path, zo={"model_init": lambda trial=None: model(), "train_dataset": ROWS, "eval_dataset": ROWS[:8]}
    )
    seen = []

    def objective(metrics):
        optimizer = told.zo_optimizer
        seen.append((optimizer.param_groups[0]["eps"], optimizer.direction, told.args.learning_rate))
        return metrics["eval_loss"]

    pytest.importorskip("optuna")
    wanted = iter([(1e-3, "gaussian", 1e-3), (4e-3, "rademacher", 2e-3)])
    told.hyperparameter_search(
        hp_space=lambda trial: dict(zip(("eps", "direction", "learning_rate"), next(wanted), strict=True)),
        compute_objective=objective,
        n_trials=2,
        backend="optuna",
    )
    assert seen == [(1e-3, "gaussian", 1e-3), (4e-3, "rademacher", 2e-3)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method_options": {"foo": 1}}, "has no option 'foo'"),
        ({"queries": 0}, "queries"),
        ({"direction": "gausian"}, "did you mean 'gaussian'"),
        ({"engine": "dul"}, "dul"),
        ({"method": "zo-adam", "fold_every": 2}, "fold_every=2"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_construction(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, **options)


@pytest.mark.parametrize("kind", [ZOTrainingArguments, tf.TrainingArguments])
def test_a_skipped_step_counts_in_no_logged_loss_and_is_nowhere_nan(tmp_path, kind):
    """Steps 3, 5 and 6 of 8 have a loss that is not finite; a line is two steps."""
    calls, seen = [], []

    def loss(trained, batch):
        calls.append(1)
        rows = row_loss(trained, batch)
        return rows * (float("nan") if (len(calls) - 1) // 2 + 1 in (3, 5, 6) else 1.0)

    zo = {"row_loss": loss, "method": "zo-sgd", "engine": "sequential"}
    told = trainer(tmp_path, kind=kind, zo=zo, logging_steps=2, save_strategy="steps", save_steps=8)
    told.add_callback(Losses(seen))
    done = told.train()
    assert told.zo_optimizer.skipped_steps == 3
    assert [step for step, at in enumerate(seen, 1) if not math.isfinite(at)] == [3, 5, 6]
    lines = [line["loss"] for line in told.state.log_history if "loss" in line]
    expected = [sum(seen[:2]) / 2, seen[3], None, sum(seen[6:]) / 2]
    assert lines == [None if one is None else pytest.approx(one, rel=1e-6) for one in expected]
    mean = sum(at for at in seen if math.isfinite(at)) / 5
    assert done.training_loss == pytest.approx(mean, rel=1e-6)
    assert done.metrics["train_loss"] == pytest.approx(mean, rel=1e-6)
    saved = (tmp_path / "checkpoint-8" / "trainer_state.json").read_text()
    assert json.loads(saved, parse_constant=pytest.fail)["global_step"] == 8


class Losses(tf.TrainerCallback):
    """Keeps each step's loss as the optimizer has it."""

    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.optimizer.last.loss)


def test_an_evaluation_that_is_not_finite_is_in_no_file_as_nan(tmp_path):
    trained = model()
    args = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 8,
        "metric_for_best_model": "loss",
    }
    told = trainer(tmp_path, trained, zo={"eval_dataset": ROWS[:8], "row_loss": row_loss}, **args)
    told.train()
    finite = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert math.isfinite(finite["best_metric"])
    with torch.no_grad():
        next(trained.parameters()).fill_(float("nan"))
    found = told.evaluate()
    assert math.isnan(found["eval_loss"])
    assert "epoch" in found
    assert told.state.log_history[-1]["eval_loss"] is None


# A resumed run.


class Changes(tf.TrainerCallback):
    """Changes what a resumed run would be told, within a run."""

    def __init__(self, step, **changes):
        self.step, self.changes = step, changes

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if state.global_step == self.step:
            changes = dict(self.changes)
            if (lr := changes.pop("learning_rate", None)) is not None:
                lr_scheduler.base_lrs = [lr] * len(lr_scheduler.base_lrs)
                changes["lr"] = lr * lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)
                lr_scheduler._last_lr = [changes["lr"]] * len(lr_scheduler.base_lrs)
            for group in optimizer.param_groups:
                group.update(changes)


def saved(tmp_path, **options):
    """A checkpoint after 3 steps of 8."""
    train(tmp_path / "begun", zo={"callbacks": [StopsAt(3)]}, save_strategy="steps", save_steps=3, **options)
    return str(tmp_path / "begun" / "checkpoint-3")


@pytest.mark.parametrize("changes", [{"eps": 4e-3}, {"learning_rate": 3e-3}, {"eps": 2e-3, "learning_rate": 5e-4}])
def test_a_resumed_run_takes_eps_and_rate_from_its_arguments(tmp_path, changes):
    whole = train(tmp_path / "whole", zo={"callbacks": [Changes(3, **changes)]})
    resumed = train(tmp_path / "resumed", resume=saved(tmp_path), **changes)
    assert same(whole.model, resumed.model)
    rates = [[line["learning_rate"] for line in t.state.log_history if "loss" in line] for t in (whole, resumed)]
    assert rates[0][3:] == rates[1][-5:]
    unchanged = train(tmp_path / "unchanged")
    assert not same(unchanged.model, resumed.model)


def test_a_resumed_run_takes_weight_decay_from_its_arguments(tmp_path):
    first = saved(tmp_path, weight_decay=0.1)
    resumed = train(tmp_path / "resumed", resume=first, weight_decay=0.5)
    assert [group["weight_decay"] for group in resumed.zo_optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("method", {"method": "zo-sgd-mmt"}),
        ("method_options", {"method_options": {"estimator": "one-sided"}}),
        ("direction", {"direction": "rademacher"}),
        ("queries", {"queries": 2}),
        ("rounding", {"rounding": "compensated"}),
        ("fold_every", {"fold_every": 4}),
        ("seed", {"seed": 7}),
    ],
)
def test_a_resumed_run_of_other_directions_or_another_rule_is_refused(tmp_path, name, changes):
    with pytest.raises(InputError, match=rf"checkpoint-3: is of a run with {name}=") as error:
        train(tmp_path / "resumed", resume=saved(tmp_path), **changes)
    assert "\n" not in str(error.value)


def test_a_resumed_run_of_other_parameter_groups_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint-3: its parameter groups are not those") as error:
        train(tmp_path / "resumed", resume=saved(tmp_path), weight_decay=0.5)
    assert "\n" not in str(error.value)


def test_a_rate_that_a_schedule_has_in_its_state_is_refused(tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    first = saved(tmp_path, **plateau)
    train(tmp_path / "same", resume=first, **plateau)
    with pytest.raises(InputError, match=r"checkpoint-3: is of a run with .*learning_rate"):
        train(tmp_path / "resumed", resume=first, learning_rate=5e-3, **plateau)


def test_a_checkpoint_without_an_optimizer_s_state_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint-3: holds no optimizer's state of step 3") as error:
        train(tmp_path / "resumed", resume=saved(tmp_path, save_only_model=True))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_older_than_what_it_keeps_goes_on(tmp_path):
    first = saved(tmp_path)
    state = torch.load(f"{first}/optimizer.pt", weights_only=True)
    del state["told"]
    torch.save(state, f"{first}/optimizer.pt")
    assert same(train(tmp_path / "resumed", resume=first).model, train(tmp_path / "whole").model)


@pytest.mark.parametrize("steps", [7, 8])
def test_a_run_that_is_resumed_after_its_last_step_takes_no_further_one(tmp_path, steps):
    whole = train(tmp_path / "whole", max_steps=steps, save_strategy="steps", save_steps=steps)
    resumed = train(tmp_path / "again", max_steps=steps, resume=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    assert resumed.state.global_step == steps
    assert resumed.zo_optimizer.steps == steps
    assert same(whole.model, resumed.model)


# What is damaged, and what is not finite.


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "pickle"])
def test_a_damaged_checkpoint_is_named_in_a_line(tmp_path, name, damage):
    checkpoint = saved(tmp_path)
    file = tmp_path / "begun" / "checkpoint-3" / name
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
            "pickle": pickle.dumps(object),
        }[damage]
    )
    with pytest.raises(InputError) as error:
        trainer(tmp_path / "again").train(resume_from_checkpoint=checkpoint)
    assert str(error.value).startswith(f"{checkpoint}: ")
    assert (name if damage != "pickle" else "") in str(error.value)
    assert one_line(error)


def share_of_first(found):
    return {"first": float((np.asarray(found.predictions).argmax(-1) == 0).mean())}


@pytest.mark.parametrize("how", ["evaluate", "predict", "batches", "preprocessed", "training"])
def test_no_metric_is_made_of_outputs_that_are_not_finite(tmp_path, how):
    """An argmax of NaN is label 0: a metric would be a plausible number."""
    zo = {"eval_dataset": ROWS[:5], "compute_metrics": share_of_first}
    options = {"per_device_eval_batch_size": 2}
    if how == "batches":
        zo["compute_metrics"] = lambda found, compute_result: share_of_first(found)
        options["batch_eval_metrics"] = True
    if how == "preprocessed":
        zo |= {
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            "compute_metrics": lambda found: {"first": float((found.predictions == 0).mean())},
        }
    if how == "training":
        options |= {"eval_strategy": "steps", "eval_steps": 2}
    told = trainer(tmp_path, model(), zo=zo, **options)
    assert math.isfinite(told.evaluate()["eval_first"])
    with torch.no_grad():
        last = list(told.model.parameters())[-1]
        last[0] = float("nan")
    ask = {"predict": lambda: told.predict(ROWS[:5]), "training": told.train}.get(how, told.evaluate)
    with pytest.raises((NotFinite, NonFiniteLoss)) as error:
        ask()
    if how != "training":
        assert "rows: outputs are not finite in float32" in str(error.value)
        assert one_line(error)
    assert told.compute_metrics is zo["compute_metrics"]


def test_what_padding_gives_and_what_a_model_rules_out_are_no_fault():
    plain = torch.nn.Linear(1, 1)
    logits, mask = torch.zeros(3, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    logits[1, 2:], logits[2, 1:] = float("nan"), float("inf")
    logits[:, :, 4] = torch.where(mask.bool(), -math.inf, logits[:, :, 4])
    seen = Outputs(plain)
    seen.look((logits, {"hidden": torch.zeros(3, 2)}), {"attention_mask": mask})
    seen.refuse()
    logits[2, 0, 0] = float("nan")
    seen.look(logits, {"attention_mask": mask})
    with pytest.raises(NotFinite, match=r"^1 of 6 rows: outputs are not finite in float32"):
        seen.refuse()
