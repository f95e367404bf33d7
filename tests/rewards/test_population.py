"""A population on rewards: its update against the formula, its record, and the anchor."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

from zotune import ZeroOrderOptimizer, noise
from zotune.directions import Displacement
from zotune.engines.places import Copy, Places
from zotune.errors import InputError
from zotune.methods import make_method, queries_of
from zotune.record.steps import StepRecord
from zotune.record.trajectory import Header, Record, TrajectoryWriter, read_file
from zotune.rewards.places import alike, asked_of, filled
from zotune.rewards.prompts import Prompt
from zotune.run.rewarding import members_of
from zotune.trainer.reward_arguments import RewardTrainingArguments
from zotune.trainer.rewarding import RewardTrainer
from zotune.updates.anchor import pull

NAN = math.nan


class Bowl(nn.Module):
    """A reward with one top."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype))

    def reward(self) -> torch.Tensor:
        return -(self.w - 2).square().mean()


def moved(model: nn.Module, steps: int = 1, **options) -> ZeroOrderOptimizer:
    optimizer = ZeroOrderOptimizer(model, "es", maximize=True, lr=0.05, eps=0.1, seed=3, **options)
    for _ in range(steps):
        optimizer.step(model.reward)
    return optimizer


def test_a_plain_loop_climbs_the_reward():
    model = Bowl()
    before = float(model.reward().detach())
    optimizer = ZeroOrderOptimizer(model, "es", maximize=True, lr=0.3, eps=0.1, queries=16)
    losses = [optimizer.step(model.reward) for _ in range(40)]
    assert float(model.reward().detach()) > before / 4
    assert optimizer.forward_passes == 40 * 16
    assert losses[0] > -before  # what a step returns is a loss still


@pytest.mark.parametrize("groups", [1, "batch"])
def test_a_step_in_pieces_climbs_too_and_as_far(groups):
    """What is evaluated is a reward for each row, in whatever pieces: one less of them, the sign, is none of theirs."""
    models = [Bowl(), Bowl()]
    batch = {"x": torch.arange(6, dtype=torch.float64)}
    for model, most in zip(models, (None, 4), strict=True):
        optimizer = ZeroOrderOptimizer(
            model, "es", maximize=True, lr=0.1, eps=0.1, queries=8, seed=3, groups=groups, micro_batch=most
        )
        before = float(model.reward().detach())
        for _ in range(20):
            optimizer.step(lambda rows, model=model: model.reward() - 0.01 * rows["x"] * model.w[0], batch=batch)
        assert float(model.reward().detach()) > before
    torch.testing.assert_close(models[0].w, models[1].w, rtol=1e-9, atol=1e-12)


def test_antithetic_pairs_are_the_z_score_over_all_their_members():
    model, by_hand = Bowl(), Bowl()
    start = by_hand.w.detach().clone()
    zs = [torch.empty(12) for _ in range(4)]
    for q, z in enumerate(zs):
        noise.fill(z, noise.step_seed(3, 0, q), noise.parameter_id("w"), "gaussian")
    rewards = []
    for z in zs:
        for sign in (1, -1):
            by_hand.w.data = start + sign * 0.1 * z
            rewards.append(float(by_hand.reward().detach()))
    found = torch.tensor(rewards, dtype=torch.float64)
    score = (found - found.mean()) / found.std(correction=0)
    wanted = start + sum(0.05 / 8 * (score[2 * q] - score[2 * q + 1]) * z.double() for q, z in enumerate(zs))
    moved(model, queries=4, estimator="two-sided")
    torch.testing.assert_close(model.w.data, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("estimator", ["leave-one-out", "two-sided"])
def test_members_that_all_score_alike_move_nothing(estimator):
    model = Bowl()
    before = model.w.detach().clone()
    optimizer = ZeroOrderOptimizer(model, "es", maximize=True, lr=1.0, queries=4, estimator=estimator)
    optimizer.step(lambda: 3.0)
    assert torch.equal(model.w, before)
    assert optimizer.last.told_nothing


def test_so_many_members_are_so_many_directions_or_half():
    assert queries_of(30, "es") == 30
    assert queries_of(30, "es", estimator="two-sided") == 15
    assert queries_of(8, make_method("eggroll", queries=8)) == 8
    with pytest.raises(ValueError, match="antithetic pairs; give an even number"):
        queries_of(5, "es", estimator="two-sided")
    with pytest.raises(ValueError, match="an object that has 8 of its own"):
        queries_of(4, make_method("eggroll", queries=8))
    with pytest.raises(ValueError, match="perturbs no models"):
        queries_of(4, "fo-sgd")


def test_the_anchor_pulls_a_share_of_the_way_back_each_step():
    """θ_t = θ₀ + Σ_s (1 − k)^(t − s)·Δ_s, from the updates that a run without it records."""
    k, free, held = 0.25, Bowl(), Bowl()
    start, moves = free.w.detach().clone(), []
    one = ZeroOrderOptimizer(held, "es", maximize=True, lr=0.05, eps=0.1, queries=4, anchor=k)
    expected = start.clone()
    for _ in range(5):
        one.step(held.reward)
        by = one.method.rule.displacement(one.last)
        delta = sum(c * z_of(seed) for seed, c in zip(by.seeds_Q, by.coefs_GQ[0], strict=True))
        moves.append(delta)
        expected = start + (1 - k) * (expected - start) + delta
    torch.testing.assert_close(held.w.data, expected, rtol=0, atol=1e-9)
    assert one.state_bytes == held.w.numel() * 8


def z_of(seed: int) -> torch.Tensor:
    z = torch.empty(12)
    noise.fill(z, seed, noise.parameter_id("w"), "gaussian")
    return z.double()


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_anchored_runs_replay_and_resume_to_the_same_bits(rounding):
    options = {"lr": 0.05, "eps": 0.1, "queries": 4, "anchor": 0.1, "maximize": True, "rounding": rounding}
    whole, cut, again = Bowl(torch.bfloat16), Bowl(torch.bfloat16), Bowl(torch.bfloat16)
    first, records = ZeroOrderOptimizer(whole, "es", **options), []
    first.watch = records.append
    for _ in range(6):
        first.step(whole.reward)
    half = ZeroOrderOptimizer(cut, "es", **options)
    for _ in range(3):
        half.step(cut.reward)
    state = copy.deepcopy(half.state_dict())
    resumed = ZeroOrderOptimizer(cut, "es", **options)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step(cut.reward)
    assert torch.equal(cut.w, whole.w)
    replayed = ZeroOrderOptimizer(again, "es", **options)
    replayed.apply_records([Record(r.step, 0.0, 0.0, r.g_GQ[0], r.lr_G, r.decay_G, r.skipped) for r in records])
    assert torch.equal(again.w, whole.w)
    assert not torch.equal(whole.w, Bowl(torch.bfloat16).w)


def test_a_pull_that_16_bits_cannot_show_is_kept_where_rounding_is():
    param = nn.Parameter(torch.full((3,), 2.0, dtype=torch.bfloat16))
    state = {param: {"anchor": torch.ones(3, dtype=torch.bfloat16), "residual": torch.zeros(3, dtype=torch.bfloat16)}}
    for _ in range(100):
        pull([param], state, 1e-3)
    total = param.double() + state[param]["residual"].double()
    torch.testing.assert_close(total, torch.full((3,), 1 + 0.999**100, dtype=torch.float64), rtol=0, atol=2e-3)


def test_folds_and_an_anchor_do_not_go_together():
    with pytest.raises(ValueError, match="an anchored decay is of each step"):
        ZeroOrderOptimizer(Bowl(), "es", anchor=0.1, fold_every=2)


# What members are asked, and what follows from missing rewards.

PROMPTS = [Prompt((i, i + 1), "a", f"p:{i}") for i in range(3)]


def test_every_member_answers_every_prompt_in_the_losses_order():
    at = Displacement((11, 22), ((0.1, 0.1),))
    members, requests = asked_of(PROMPTS, Places(at, (Copy(1, 0), Copy(-1, 0), Copy(1, 1), Copy(0))), (4, 5, 6))
    assert members == [(11, 1), (11, -1), (22, 1)]
    assert [(r.row, r.member) for r in requests] == [(row, m) for m in (0, 1, 2, -1) for row in (4, 5, 6)]
    assert requests[4].prompt == (1, 2)


def test_a_direction_a_slot_gives_each_answer_a_member_of_its_own():
    at = Displacement(tuple(range(6)), ((0.1,) * 6,))
    members, requests = asked_of(PROMPTS, Places(at, (Copy(1, 0), Copy(1, 3)), (1, 1, 1)), range(3))
    assert members == [(seed, 1) for seed in range(6)]
    assert [(r.row, r.member) for r in requests] == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4), (2, 5)]


def test_a_missing_reward_neither_praises_nor_blames():
    rewards_CB = torch.tensor([[1.0, 5.0, NAN], [3.0, NAN, NAN], [NAN, 1.0, NAN]], dtype=torch.float64)
    full = filled(rewards_CB)
    assert torch.equal(full, torch.tensor([[1.0, 5.0, 0.0], [3.0, 3.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64))
    assert alike(rewards_CB) == pytest.approx(1 / 3)
    assert alike(torch.ones(4, 2)) == 1


def test_a_members_reward_is_the_mean_over_its_prompts_however_many_directions_they_have():
    one = StepRecord(0, (1, 2), (-1.0, -3.0), ((0.0, 0.0),), (0.1,), (0.0,))
    assert members_of(one) == [-1.0, -3.0]
    assert members_of(replace(one, losses_P=(-1.0, -3.0, -5.0, -9.0), shares=(1, 1))) == [-2.0, -7.0]


def test_a_trajectory_keeps_each_members_reward(tmp_path):
    header = Header(1, "gaussian", "es", 0, 2, pairs=2, members=3, layout=("lr", "rewards"))
    record = Record(0, 1.0, 2.0, (0.5, -0.5), (0.25,), (0.0,), rewards=(1.5, NAN, -2.0))
    with TrajectoryWriter.create(tmp_path / "t.zot", header) as writer:
        writer.append(record)
        with pytest.raises(ValueError, match="rewards is"):
            writer.append(replace(record, step=1, rewards=(1.0,)))
        writer.append(replace(record, step=1, rewards=(0.0, 1.0, 2.0)))
        writer.mark_chosen(2)
    read = read_file(tmp_path / "t.zot")
    assert read.records[1].rewards == (0.0, 1.0, 2.0)
    assert read.records[0].rewards[0] == 1.5
    assert math.isnan(read.records[0].rewards[1])
    assert read.records[0].lr == (0.25,)
    for layout, members in ((("lr",), 3), (("lr", "rewards"), 0)):
        with pytest.raises(ValueError, match="members is"):
            Header(1, "gaussian", "es", 0, 2, members=members, layout=layout)


# The Trainer.

TEXTS = ["the film", "a day", "good and", "the terrible day", "It was", "a great"]


def share_of_e(completions, **_):
    return [text.count("e") / max(1, len(text)) for text in completions]


def trainer(tmp_path, functions=share_of_e, prompts=TEXTS, **changes) -> RewardTrainer:
    options = {
        "output_dir": str(tmp_path), "max_steps": 3, "members": 8, "sigma": 5e-2, "learning_rate": 0.025,
        "max_completion_length": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    args = RewardTrainingArguments(**(options | changes))
    rows = [{"prompt": text} for text in prompts]
    return RewardTrainer(tiny.causal_model(), functions, args, rows, rows, processing_class=tiny.tokenizer(bos=True))


def test_the_trainer_raises_a_reward(tmp_path):
    """Of a model with twelve tokens: the share of one of them, drawn."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    args = RewardTrainingArguments(
        output_dir=str(tmp_path), max_steps=30, members=24, sigma=0.1, learning_rate=0.2, temperature=1.0, use_cpu=True,
        max_completion_length=6, per_device_train_batch_size=4, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    prompts = [Prompt((3 + i, 4), "a", f"p:{i}") for i in range(4)]

    def share_of_five(completion_ids, **_):
        return [sum(i == 5 for i in ids) / max(1, len(ids)) for ids in completion_ids]

    model = tf.LlamaForCausalLM(config).eval()
    made = RewardTrainer(model, share_of_five, args, prompts, prompts, processing_class=tiny.tokenizer(bos=True))
    before = made.evaluate()["eval_reward"]
    made.train()
    after = made.evaluate()["eval_reward"]
    assert before < 0.3
    assert after > 0.6
    last = [line for line in made.state.log_history if "reward_std" in line][-1]
    assert {
        "rewards/share_of_five/mean",
        "frac_reward_zero_std",
        "completions/mean_length",
        "tokens_per_second",
    } <= set(last)
    assert last["loss"] == pytest.approx(-last["reward"], abs=1e-6)


def mean_id(completion_ids, **_):
    return [sum(ids) / max(1, len(ids)) for ids in completion_ids]


def drawn_z(name: str, shape: torch.Size, seed: int, low_rank: bool) -> torch.Tensor:
    """z of a parameter, by the definition: noise of its name, or of its two factors."""

    def fill(name: str, count: int) -> torch.Tensor:
        out = torch.empty(count)
        noise.fill(out, seed, noise.parameter_id(name), "gaussian")
        return out

    if low_rank and len(shape) > 1:
        return fill(f"{name}.U", shape[0])[:, None] * fill(f"{name}.V", shape[1])[None]
    return fill(name, shape.numel()).view(shape)


@pytest.mark.parametrize("engine", ["lowrank", "sequential"])
def test_a_step_is_the_formula_on_what_displaced_copies_generate(tmp_path, engine):
    """θ₁ − θ₀ = (α/N)·Σ ẑ(R_m)·z_m, with R_m of answers by transformers' `generate` on copies that are displaced by hand."""
    made = trainer(tmp_path, mean_id, max_steps=1, engine=engine, prompts=TEXTS[:4], members=6)
    model = made.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(start)
    zs = []
    for m in range(6):
        seed = noise.step_seed(1, 0, m)
        zs.append({name: drawn_z(name, start[name].shape, seed, engine == "lowrank") for name in names})
    rewards = []
    for z in zs:
        copy_of = copy.deepcopy(model)
        for name, p in copy_of.named_parameters():
            p.data = start[name] + 5e-2 * z[name]
        found = []
        for prompt in made.train_dataset:
            ids = torch.tensor([prompt.ids])
            whole = copy_of.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                     eos_token_id=list(made.settings.ends), pad_token_id=1)  # fmt: skip
            answer = whole[0, len(prompt.ids) :].tolist()
            end = next((i for i, token in enumerate(answer) if token in made.settings.ends), len(answer))
            found.append(mean_id([answer[:end]])[0])
        rewards.append(sum(found) / len(found))
    made.train()
    r = torch.tensor(rewards, dtype=torch.float64)
    score = (r - r.mean()) / r.std(correction=0)
    assert r.std() > 0
    for name, p in model.named_parameters():
        wanted = start[name].double() + sum(0.025 / 6 * s * z[name].double() for s, z in zip(score, zs, strict=True))
        torch.testing.assert_close(p.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"decoder": "generate"}, {"slots": 3}],
    ids=["one member after the other", "few slots"],
)
def test_how_answers_are_written_changes_no_step(tmp_path, changes):
    one, other = trainer(tmp_path), trainer(tmp_path, **changes)
    one.train()
    other.train()
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": "batch", "method": "eggroll", "learning_rate": 1e-3},
        {"method_options": {"estimator": "two-sided"}},
        {"temperature": 1.0, "top_k": 5},
        {"engine": "sequential"},
        {"method": "fzoo"},
        {"method": "copes", "engine": "sequential"},
    ],
    ids=[
        "a direction a slot",
        "antithetic pairs",
        "drawn answers",
        "dense directions",
        "beside θ itself",
        "sets of elements",
    ],
)
def test_every_kind_of_population_steps_and_repeats_itself(tmp_path, changes):
    one, other = trainer(tmp_path, **changes), trainer(tmp_path, **changes)
    start = [p.detach().clone() for p in one.model.parameters()]
    one.train()
    other.train()
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(start, one.model.parameters(), strict=True))


def test_the_rate_keeps_its_proportion_to_sigma_which_falls_to_half(tmp_path):
    made = trainer(tmp_path, max_steps=4)
    records = []
    made.create_optimizer()
    made.zo_optimizer.watch = records.append
    seen = []
    write = made.write
    made.zo_optimizer.engine.write = lambda requests, members, eps_G: (
        seen.append(eps_G[0]) or write(requests, members, eps_G)
    )
    made.train()
    factors = [0.75 + 0.25 * math.cos(math.pi * s / 4) for s in range(4)]
    assert [r.lr_G[0] for r in records] == pytest.approx([0.025 * f for f in factors])
    assert seen == pytest.approx([0.05 * f for f in factors])


def test_where_nothing_is_said_sigma_and_the_walk_are_shares_of_the_weights(tmp_path):
    """σ is 0.02·s. Of a z-score w is 1/N, so that N = 8 and F = Σ f² give lr = 0.03·s·f·√(N/F), but for how sure w is."""
    made = trainer(tmp_path, any_number, max_steps=40, sigma=None, learning_rate=None)
    every = torch.cat([p.detach().flatten() for p in made.model.parameters()]).double()
    s = float(every.square().mean().sqrt())
    assert made.args.sigma == pytest.approx(0.02 * s, rel=1e-2)
    records = []
    made.create_optimizer()
    made.zo_optimizer.watch = records.append
    made.train()
    f = [0.75 + 0.25 * math.cos(math.pi * k / 40) for k in range(40)]
    wanted = [0.03 * s * f_k * math.sqrt(8 / sum(x * x for x in f)) for f_k in f]
    first, last = records[0].lr_G[0] / wanted[0], records[-1].lr_G[0] / wanted[-1]
    assert 0.6 < first < last < 1
    assert last > 0.9  # after 300 directions w is known
    walk = math.sqrt(sum(sum(c * c for c in coefficients(made, record)) for record in records))
    assert 0.8 < walk / (0.03 * s) < 1


def any_number(completions, trainer_state, **_):
    draw = random.Random(trainer_state.global_step)
    return [draw.random() for _ in completions]


def coefficients(made, record):
    return made.zo_optimizer.method.rule.displacement(record).coefs_GQ[0]


def test_steps_that_tell_nothing_are_counted_and_said(tmp_path, caplog):
    made = trainer(tmp_path, lambda completions, **_: [1.0] * len(completions), max_steps=11)
    made.train()
    assert made.told_nothing == 11
    said = [r.message for r in caplog.records if "tells nothing" in r.message]
    assert len(said) == 1
    assert "a larger sigma, a temperature above 0" in said[0]


def test_16_bit_weights_keep_what_rounding_takes(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "members": 4, "max_steps": 1}
    args = RewardTrainingArguments(**options)
    model = tiny.causal_model().bfloat16()
    made = RewardTrainer(model, share_of_e, args, [{"prompt": "a"}], processing_class=tiny.tokenizer())
    made.create_optimizer()
    assert made.zo_optimizer.method.rule.rounding == "compensated"
    assert trainer(tmp_path).args.rounding == "nearest"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": 1e-2}, "of rewards it is sigma"),
        ({"queries": 3}, "of rewards it is members"),
        ({"members": 1}, "give 2 or more"),
        ({"sigma": 0.0}, "must be above 0"),
        ({"gradient_accumulation_steps": 2}, "give per_device_train_batch_size"),
        ({"sigma_schedule": "linear"}, "choose from cosine, constant"),
        ({"method_options": {"sparsity": 0.5}, "engine": "auto"}, "members are perturbed in all that trains"),
        ({"method": "zo-sgd-cons", "engine": "auto"}, "compares moves of its own"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
    ],
)
def test_what_the_trainer_cannot_do_is_one_line(tmp_path, changes, said):
    with pytest.raises((InputError, ValueError), match=said):
        trainer(tmp_path, **changes)
