"""`ZOTrainer` where `Trainer` stood: everything but the step is the Trainer's own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from zotune import ZOTrainer, ZOTrainingArguments

CONFIG = tf.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS = [{"input_ids": [i % 60 + 1, 2, 3, 4], "labels": [-100, 2, 3, 4]} for i in range(32)]


def collate(batch):
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(copy.deepcopy(CONFIG))


def train(tmp_path, trained=None, resume=None, kind=ZOTrainingArguments, zo=None, **options):
    args = kind(
        output_dir=str(tmp_path), **{
            "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
            "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "linear",
        } | options,
    )  # fmt: skip
    trainer = ZOTrainer(
        model=trained or model(),
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        data_collator=collate,
        **(zo or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_script_changes_by_a_name_and_a_method(tmp_path):
    before = model()
    trainer = train(tmp_path, kind=tf.TrainingArguments, zo={"method": "zo-sgd"}, eval_strategy="steps", eval_steps=4)
    assert not same(before, trainer.model)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["forward_passes"] for line in logs] == list(range(2, 18, 2))
    assert all("projected_gradient" in line for line in logs)
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 2
    rates = [line["learning_rate"] for line in logs]
    assert rates == pytest.approx([1e-3 * (1 - i / 8) for i in range(8)])
    assert all(p.grad is None for p in trainer.model.parameters())


def test_micro_batches_share_their_directions_and_make_one_batch(tmp_path):
    one = train(tmp_path / "a", per_device_train_batch_size=8)
    two = train(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    ulp, eps, lr, steps, z = 2.0**-21, 1e-3, 1e-3, 8, 5  # of a loss over 4; losses may differ by one, so g by ulp/eps
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=steps * lr * (ulp / eps) * z)
    moved = max((p - q).abs().max() for p, q in zip(one.model.parameters(), model().parameters(), strict=True))
    assert moved > 100 * steps * lr * (ulp / eps) * z


def test_a_checkpoint_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "a", save_strategy="steps", save_steps=3)
    resumed = train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert same(whole.model, resumed.model)
    assert resumed.zo_optimizer.forward_passes == 16


def row_loss(model, inputs):
    logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), inputs["labels"][:, 1:], ignore_index=-100, reduction="none"
    ).mean(1)


class Watching(tf.TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append([p.detach().clone() for p in model.parameters()])


def test_whoever_reads_the_weights_finds_an_update_that_was_held_back(tmp_path, monkeypatch):
    """The engine that holds updates back, and the same that does not: evaluations, checkpoints, callbacks and the end."""
    held = {"zo": {"engine": "dual", "row_loss": row_loss}, "save_strategy": "steps", "save_steps": 3}
    held |= {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4}
    ours = train(tmp_path / "ours", **held)
    assert ours.zo_optimizer.engine.writer.holds
    holding = []
    monkeypatch.setattr("zotune.engines.waiting.WaitingWriter.holds", property(lambda self: holding.append(1)))
    theirs = train(tmp_path / "theirs", **held)
    watched = Watching()
    train(tmp_path / "watched", zo=held["zo"] | {"callbacks": [watched]})
    monkeypatch.undo()
    assert holding
    assert same(ours.model, theirs.model)
    assert not same(ours.model, model())
    evaluations = [[line["eval_loss"] for line in t.state.log_history if "eval_loss" in line] for t in (ours, theirs)]
    assert evaluations[0] == evaluations[1]
    for step in (3, 6):
        saved = [tf.LlamaForCausalLM.from_pretrained(tmp_path / n / f"checkpoint-{step}") for n in ("ours", "theirs")]
        assert same(*saved)
    again = Watching()
    trainer = train(tmp_path / "again", zo=held["zo"] | {"callbacks": [again]})
    assert trainer.zo_optimizer.engine.writer.holds
    assert len(again.seen) == len(watched.seen) == 8
    for ours_P, theirs_P in zip(again.seen, watched.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours_P, theirs_P, strict=True))
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "ours" / "checkpoint-3"), **held)
    assert same(resumed.model, ours.model)


def test_what_makes_no_sense_without_a_gradient_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no gradient to clip"):
        train(tmp_path, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="zo-sgd"):
        train(tmp_path, zo={"method": "zo-sdg"})


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trainable parameter: none has requires_grad=True"):
        train(tmp_path, model().requires_grad_(False))


def test_a_step_does_not_walk_through_the_model(tmp_path, monkeypatch):
    """A step of a large model takes less than what the Trainer does with gradients and modes that are not there."""
    walks = {"zero_grad": 0, "train": 0, "num_parameters": 0}

    def counted(kind, name):
        plain = getattr(kind, name)

        def walk(self, *args, **kwargs):
            walks[name] += not isinstance(self, torch.nn.Module) or isinstance(self, tf.PreTrainedModel)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, walk)

    counted(torch.nn.Module, "zero_grad")
    counted(torch.nn.Module, "train")
    counted(tf.PreTrainedModel, "num_parameters")
    trainer = train(tmp_path)
    assert walks["zero_grad"] == 0
    assert walks["train"] <= 6  # at the beginning and the end, none a step
    assert walks["num_parameters"] == 1
    assert "zero_grad" not in trainer.model.__dict__
    tokens, passes = 8 * 8 * 4, 2
    assert trainer.state.total_flos == 2 * passes * tokens * trainer.model.num_parameters(exclude_embeddings=True)


class StopsAt(tf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_is_stopped_early_ends_with_all_its_updates(tmp_path, monkeypatch):
    def stopped(step, fold_every):
        trained = model()
        args = ZOTrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-3, report_to="none",
            use_cpu=True, save_strategy="no", disable_tqdm=True, fold_every=fold_every,
        )  # fmt: skip
        trainer = ZOTrainer(trained, args, train_dataset=ROWS, data_collator=collate, callbacks=[StopsAt(step)])
        trainer.train()
        assert not trainer.zo_optimizer.pending
        return trained

    assert same(stopped(4, 4), stopped(4, 8))


def test_directions_of_own_inputs_come_with_their_method_and_resume(tmp_path):
    """One a row without a word; the trainer's own checkpoints are enough to go on from."""
    zo = {"method": "own-inputs", "row_loss": row_loss, "queries": 2}
    whole = train(tmp_path / "a", zo=zo, save_strategy="steps", save_steps=3)
    resumed = train(tmp_path / "b", zo=zo, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert whole.zo_optimizer.groups == "batch"
    assert same(whole.model, resumed.model)
    assert resumed.zo_optimizer.forward_passes == 8 * 5
