"""`RewardTrainer`: a `ZOTrainer` whose steps are taken on what the model writes, by reward functions."""

# C copies of a batch (one a member), B prompts, n = C·B answers, F functions.

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from zotune.decode import Answer, Decoder, Request, Settings, decoder_for
from zotune.decode.plain import left_out
from zotune.errors import InputError, WorkerError
from zotune.models.ids import embedding_rows, pad_id
from zotune.models.loading import length_limit, load_model, load_tokenizer
from zotune.rewards.asking import Rewards, Scores, Written
from zotune.rewards.functions import as_rewards
from zotune.rewards.places import ANSWERS, REQUESTS, WritingEngine, alike, filled
from zotune.rewards.prompts import Prompt, PromptEncoder, ends_of
from zotune.step.rates import RHO_WRITING, sigma_of
from zotune.tasks import ends
from zotune.tasks.encoding import Encoder
from zotune.tasks.rows import BadRows, rows_of
from zotune.trainer.reward_arguments import RewardTrainingArguments
from zotune.trainer.trainer import ZOTrainer

logger = logging.getLogger(__name__)

HELD_OUT = (1 << 32) - 1  # the step whose draws serve for held-out prompts: the same luck before and after
PATIENCE = 10  # steps in a row that told nothing, until that is said


class RewardTrainer(ZOTrainer):
    """Raises the mean reward of what a causal model writes, by evolution strategies: no gradient of anything.

    A step: all members θ + σ·z_m answer its prompts, the functions say what the answers are worth, θ ← θ + (α/N)·Σ_m ẑ(R_m)·z_m
    (`es`; see docs/methods.md). Logs carry TRL's names: reward, reward_std, rewards/NAME/mean and rewards/NAME/std,
    frac_reward_zero_std (of prompts whose members all score alike), completions/mean_length, completions/clipped_ratio, and
    tokens_per_second.

    model: a causal model, or a name. reward_funcs: functions by TRL's signature, or names (`zotune.rewards.functions`).
    args: `RewardTrainingArguments`. train_dataset, eval_dataset: dicts, a `datasets.Dataset`, or `Prompt`s: rows with a column
    `prompt`, a text or messages. processing_class: the tokenizer [the model's own]. Everything else is `ZOTrainer`'s.

    Raises `RewardError` for a function that fails; the last checkpoint is whole then.
    """

    args: RewardTrainingArguments

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RewardTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else RewardTrainingArguments()
        if not isinstance(args, RewardTrainingArguments):
            raise InputError(f"args: a {type(args).__name__}; give RewardTrainingArguments")
        named = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        if isinstance(model, str):
            model = load_model(model, device=args.device)
        self.tokenizer: Any = processing_class if processing_class is not None else load_tokenizer(named)
        several = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.rewards = Rewards(as_rewards(several), args.reward_weights, args.reward_timeout)
        encode = PromptEncoder(
            self.tokenizer,
            Encoder(self.tokenizer, length_limit(model), vocabulary=embedding_rows(model)),
            chat=args.chat,
        )
        prompts = [None if given is None else _prompts(given, encode) for given in (train_dataset, eval_dataset)]
        conversational = any(one.conversational for given in prompts for one in given or ())
        self.settings = settings_of(args, model, self.tokenizer, conversational)
        if args.rounding is None:
            narrow = any(p.dtype.itemsize < 4 for p in model.parameters() if p.requires_grad)
            args.rounding = "compensated" if narrow else "nearest"
        if args.sigma is None:
            args.sigma = args.eps = sigma_of([p for p in model.parameters() if p.requires_grad], model)
        self.sigma: float = args.sigma
        self.told: dict[int, dict[str, Any]] = {}  # what each step found, by its number (from 1)
        self._parts: list[Part] = []  # of the step under way, as far as this process has them
        self._untold = False  # whether a step was taken of which `tell` has not told
        self.told_nothing = 0  # steps whose members all scored alike
        self._nothing_in_a_row = 0
        self._decoder: Decoder | None = None
        self._found: dict[str, Any] = {}
        # Without the tokenizer, by which the Trainer would alter the model's own ends and padding.
        super().__init__(
            model, args, train_dataset=prompts[0], eval_dataset=prompts[1], data_collator=collate, **kwargs
        )

    # The optimizer: the population's, with an engine that has answers written.

    def _made_optimizer(self, model: Any) -> Any:
        optimizer = super()._made_optimizer(model)
        more = optimizer.enhancements
        if given := next((name for name in ("sparsity", "blocks", "hybrid") if getattr(more, name) is not None), None):
            raise InputError(f"{given}: members are perturbed in all that trains; leave it out")
        optimizer.method = replace(optimizer.method, maximize=True)
        if optimizer.method.rule.extra_forwards:
            raise InputError("method: compares moves of its own, which rewards are not asked for; use es or eggroll")
        if optimizer.rate is not None:
            optimizer.rate.rho = RHO_WRITING
        optimizer.engine = WritingEngine(optimizer.engine, self.write)
        optimizer.blocks = [optimizer.engine]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate keeps its proportion to σ."""
        if self.lr_scheduler is None:
            own: Any = self.optimizer if optimizer is None else optimizer
            factor = lambda step: self.args.factor(step, num_training_steps)  # noqa: E731
            self.lr_scheduler = LambdaLR(own, factor)
            if self.zo_optimizer.rate is not None:
                self.zo_optimizer.rate.plan(num_training_steps, factor)
        return self.lr_scheduler

    @property
    def decoder(self) -> Decoder:
        """Made when first asked for, over the optimizer's own directions."""
        if self._decoder is None:
            self.create_optimizer()
            engine, model = self.zo_optimizer.engine, self.model
            assert model is not None
            rank = self.zo_optimizer.rank if engine.name == "lowrank" else None
            made, why = decoder_for(model, engine.directions, self.sigma, rank, self.args.slots, self.args.decoder)
            for line in (why, left_out(model)):
                if line:
                    self.say(line)
            self._decoder = made
        return self._decoder

    def write(
        self, requests: Sequence[Request], members: Sequence[tuple[int, int]], eps_G: Sequence[float]
    ) -> list[Answer]:
        """The answers of a step, by the members at σ = eps."""
        return self._write(requests, members, eps_G, self.zo_optimizer.steps)

    def _write(
        self, requests: Sequence[Request], members: Sequence[tuple[int, int]], eps_G: Sequence[float], step: int
    ) -> list[Answer]:
        decoder: Any = self.decoder
        decoder.population.eps_G = tuple(eps_G)
        began = time.perf_counter()
        answers: list[Answer] = decoder.generate(
            requests, members, settings=self.settings, seed=self.args.seed, step=step, advance=self.wrote
        )
        self._found["seconds"] = self._found.get("seconds", 0.0) + time.perf_counter() - began
        return answers

    def wrote(self, answers: int) -> None:
        """Told how many answers are new, while they are written."""

    # A step.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.eval()
        optimizer, self._found, self._parts, self._untold = self.zo_optimizer, {}, [], True
        factor = self.args.factor(optimizer.steps, self.state.max_steps)
        for group in optimizer.param_groups:
            group["eps"] = self.sigma * factor
        loss = optimizer.step(self.rewards_of, batch=self._numbered(inputs))
        self.tell()
        return self.tally.add(torch.as_tensor(loss, dtype=torch.float32, device=self.args.device))

    def _numbered(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with its rows' numbers in the step, which draws depend on: behind those of the processes before this one."""
        if self._workers is None:
            return inputs
        before = sum(self._workers.counts(len(inputs["prompts"]))[: self._workers.rank])
        return {**inputs, "rows": inputs["rows"] + before}

    def rewards_of(self, batch: Mapping[str, Any]) -> Tensor:
        """(n,) float64: the reward of each answer, missing ones at their prompt's mean; NaN where logits were no numbers.

        batch: the step's prompts, or a piece of them (`micro_batch`), whose functions are asked where it was written.
        """
        answers: Sequence[Answer] = batch[ANSWERS]
        prompts: Sequence[Prompt] = batch["prompts"]
        written = self.read(prompts, batch[REQUESTS], answers)
        scores = self.rewards(written, self.state)
        rewards_CB = torch.tensor(scores.total_n, dtype=torch.float64).view(-1, len(prompts))
        self._parts.append(Part(int(batch["rows"][0]), len(prompts), written, scores))
        found_n = filled(rewards_CB).flatten()
        found_n[[not answer.finite for answer in answers]] = math.nan
        return found_n

    def read(self, prompts: Sequence[Prompt], requests: Sequence[Request], answers: Sequence[Answer]) -> list[Written]:
        texts = self.tokenizer.batch_decode([list(answer.tokens) for answer in answers], skip_special_tokens=True)
        return [
            Written(prompts[i % len(prompts)], str(text), answer.tokens, answer.finished, request.member)
            for i, (request, text, answer) in enumerate(zip(requests, texts, answers, strict=True))
        ]

    def tell(self) -> None:
        """What the last step found, of all its pieces and workers, is seen; once, and by all workers at the same time."""
        if not self._untold:
            return
        self._untold = False
        workers, mine = self.zo_optimizer.sharing.workers, (self._parts, self._found, self.decoder.name)
        told = [mine] if workers is None else workers.everyone(mine)
        if len(names := {name: rank for rank, (_, _, name) in enumerate(told)}) > 1:
            raise WorkerError(
                f"workers write by {' and '.join(sorted(names))}: their answers are not alike; give all --decoder generate"
            )
        if workers is not None and workers.own_rows:
            parts = [part for theirs, _, _ in told for part in theirs]
        else:  # of the first step's first piece, which all have written, one
            found = {part.first: part for theirs, _, _ in told for part in theirs}
            parts = [found[first] for first in sorted(found)]
        if seconds := max(found.get("seconds", 0.0) for _, found, _ in told):
            self._found["seconds"] = seconds
        self._parts = []
        self.see(*joined_parts(parts))

    def see(self, written: Sequence[Written], scores: Scores, rewards_CB: Tensor) -> None:
        """What the step found, for the log, and a line where steps tell nothing."""
        step, found = self.zo_optimizer.steps, self._found
        self.told[step] = statistics(self.rewards.names, written, scores, rewards_CB) | found
        nothing = self.told[step]["frac_reward_zero_std"] == 1
        self.told_nothing += nothing
        self._nothing_in_a_row = self._nothing_in_a_row + 1 if nothing else 0
        if self._nothing_in_a_row == PATIENCE:
            drawn = "" if self.settings.temperature else ", a temperature above 0"
            self.say(
                f"step {step}: in {PATIENCE} steps in a row all members scored alike, which tells nothing; try a larger sigma"
                f"{drawn}, prompts that are neither too easy nor too hard, or a reward with more values"
            )
        if (
            self.args.log_completions
            and self.is_world_process_zero()
            and step % max(1, int(self.args.logging_steps)) == 0
        ):
            self.show(step, written, scores)

    def say(self, line: str) -> None:
        if self._workers is None or self._workers.first:
            logger.warning("%s", line)

    def show(self, step: int, written: Sequence[Written], scores: Scores) -> None:
        """Some answers with their rewards."""
        from rich.console import Console

        from zotune.rewards.shown import samples, table_of

        shown = samples(step, self.rewards.names, written, scores, self.args.num_completions_to_print)
        Console().print(table_of(step, shown))

    # Held-out prompts.

    def scored(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[Written], Scores]:
        """What the model itself, unperturbed, gets for its answers: statistics, the answers, and their rewards."""
        self.create_optimizer()
        self.settle()
        requests = [Request(prompt.ids, row) for row, prompt in enumerate(prompts)]
        with torch.no_grad():
            answers = self._write(requests, (), [self.sigma] * len(self.zo_optimizer.param_groups), HELD_OUT)
        written = self.read(prompts, requests, answers)
        scores = self.rewards(written, self.state)
        found = statistics(self.rewards.names, written, scores, torch.tensor([scores.total_n], dtype=torch.float64))
        del found["reward_std"], found["frac_reward_zero_std"]
        return found, written, scores

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean reward of the model's own answers to held-out prompts, by the decoder that the steps have."""
        prompts: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if prompts is None:
            raise InputError("eval_dataset: none was given")

        # of several processes the first alone asks the functions, so that all take the same for the best
        def score() -> Any:
            return self.scored(prompts)[0]

        found = score() if self._workers is None else self._workers.from_first(score)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """With the tokenizer, but into checkpoints."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            self.tokenizer.save_pretrained(output_dir or self.args.output_dir)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Beside the loss (−R) what the steps since the last line found."""
        if "loss" in logs:
            logs |= self.since_last(self.state.global_step)
        super().log(logs, *args, **kwargs)

    def since_last(self, step: int) -> dict[str, float]:
        """The means over the steps behind the last line, up to this one; of those that are known."""
        last = max((int(line["step"]) for line in self.state.log_history if "loss" in line), default=0)
        return joined([self.told[s] for s in range(last + 1, step + 1) if s in self.told])


class Part(NamedTuple):
    """A piece of a step: rows first … first + rows − 1, answered by all members, one after the other."""

    first: int
    rows: int
    written: list[Written]
    scores: Scores


def joined_parts(parts: Sequence[Part]) -> tuple[list[Written], Scores, Tensor]:
    """The answers of a step, member by member and within one prompt by prompt, their scores, and (C, B) what each got."""
    copies = len(parts[0].written) // parts[0].rows

    def whole(of: Callable[[Part], Sequence[Any]]) -> list[Any]:
        return [one for c in range(copies) for part in parts for one in of(part)[c * part.rows : (c + 1) * part.rows]]

    functions = range(len(parts[0].scores.by_function_Fn))
    by_function_Fn = [whole(lambda part, f=f: part.scores.by_function_Fn[f]) for f in functions]  # type: ignore[misc]
    extra = dict.fromkeys(name for part in parts for name in part.scores.extra_n)
    extra_n = {
        name: whole(lambda part, name=name: part.scores.extra_n.get(name) or [None] * len(part.written))  # type: ignore[misc]
        for name in extra
    }
    metrics = {
        name: [value for part in parts for value in part.scores.metrics.get(name, ())]
        for name in dict.fromkeys(name for part in parts for name in part.scores.metrics)
    }
    scores = Scores(by_function_Fn, whole(lambda part: part.scores.total_n), extra_n, metrics)
    rewards_CB = torch.tensor(scores.total_n, dtype=torch.float64).view(copies, -1)
    return whole(lambda part: part.written), scores, rewards_CB


def settings_of(args: RewardTrainingArguments, model: Any, tokenizer: Any, conversational: bool) -> Settings:
    """How answers are written. Raises InputError for values that cannot be."""
    try:
        return Settings(
            args.max_completion_length,
            args.temperature,
            args.top_k,
            args.top_p,
            ends_of(tokenizer, sorted(ends.of(model)), conversational),
            pad_id(tokenizer, model),
        )
    except ValueError as error:
        raise InputError(str(error).replace("max_new_tokens", "max_completion_length")) from None


def collate(prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {"rows": torch.arange(len(prompts)), "prompts": list(prompts)}


def _prompts(given: Any, encode: PromptEncoder) -> list[Prompt]:
    rows = list(given)
    if all(isinstance(row, Prompt) for row in rows):
        return rows
    return [encode(row) for row in rows_of(rows, "dataset", BadRows())]


def statistics(names: Sequence[str], written: Sequence[Written], scores: Scores, rewards_CB: Tensor) -> dict[str, Any]:
    """Of a step's answers, under TRL's names. reward_std: over the members, of their means. tokens: written."""
    tokens = [len(answer.ids) for answer in written]
    member_C = torch.nanmean(rewards_CB, 1)
    member_C = member_C[~member_C.isnan()]
    found: dict[str, Any] = {
        "reward": float(torch.nanmean(rewards_CB)),
        "reward_std": float(member_C.std(correction=0)) if len(member_C) else math.nan,
        "frac_reward_zero_std": alike(rewards_CB),
        "completions/mean_length": sum(tokens) / len(tokens),
        "completions/clipped_ratio": sum(not answer.finished for answer in written) / len(written),
        "tokens": sum(tokens),
    }
    for name, own_n in zip(names, scores.by_function_Fn, strict=True):
        own = torch.tensor(own_n, dtype=torch.float64)
        own = own[~own.isnan()]
        found[f"rewards/{name}/mean"] = float(own.mean()) if len(own) else math.nan
        found[f"rewards/{name}/std"] = float(own.std(correction=0)) if len(own) else math.nan
    return {name: sum(values) / len(values) for name, values in scores.metrics.items()} | found


def joined(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means of several steps' statistics; tokens and seconds as tokens a second."""
    if not found:
        return {}
    made = {}
    for name in found[0]:
        if name not in ("tokens", "seconds"):
            known = [one[name] for one in found if one.get(name) is not None and not math.isnan(one[name])]
            made[name] = sum(known) / len(known) if known else math.nan
    seconds = sum(one.get("seconds", 0.0) for one in found)
    if seconds:
        made["tokens_per_second"] = sum(one["tokens"] for one in found) / seconds
    return made
