"""What a run on rewards begins with: prompts as the model reads them, the functions, and the model with its scheme on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn

from zotune.engines.following import most_tokens
from zotune.errors import InputError
from zotune.models import schemes
from zotune.models.ids import embedding_rows
from zotune.models.kinds import kind_of
from zotune.models.loading import length_limit
from zotune.models.quantized import base_dtype, refuse_rough
from zotune.options import RewardConfig
from zotune.options.reward import HELD_OUT
from zotune.prepare.identity import identity_of_prompts
from zotune.prepare.model import load
from zotune.prepare.ready import Ready
from zotune.record.fingerprints import fingerprint
from zotune.rewards import Reward
from zotune.rewards.functions import as_rewards
from zotune.rewards.gym import GYM, gym_rows
from zotune.rewards.prompts import Prompt, PromptEncoder, asked, ends_of
from zotune.step.rates import sigma_of
from zotune.tasks import ends
from zotune.tasks.encoding import Encoder
from zotune.tasks.splits import Source, draw, find_source, some_of


@dataclass(frozen=True)
class Rewarded:
    """What a run on rewards is on: its prompts, by name."""

    name: str
    metric: str = "reward"
    labels: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class PreparedReward(Ready):
    """A model with its scheme on, the prompts that it will answer, and the functions that say what the answers are worth.

    Where there is no test split, test is validation, and `test_split` says so. ends: the tokens that end an answer.
    """

    config: RewardConfig
    functions: list[Reward]
    train: list[Prompt]
    validation: list[Prompt]
    test: list[Prompt]
    test_split: str
    given: dict[str, int] = field(default_factory=dict)

    def described(self) -> str:
        train, test = self.given.get("train", 0), self.given.get("test", 0)
        held = self.given.get("validation")
        parts = [f"{some_of(len(self.train), train)} to train on"]
        of = f" (of the same {train:,})" if held is None else ""
        parts.append(f"{some_of(len(self.validation), held or 0)} to choose by{of}")
        parts.append(
            f"{some_of(len(self.test), test)} to test on" if self.test_split == "test" else "the same to test on"
        )
        return f"prompts: {', '.join(parts)}"


def prepare_reward(config: RewardConfig) -> PreparedReward:
    """Functions and data first, since they fail fastest; then the model, the scheme on it, and the prompts as ids."""
    functions = as_rewards(config.functions)
    source = _source(config)
    held = config.eval_size or HELD_OUT
    source = source.asking(functools.partial(asked, template=config.template))
    rows = draw(source, train_size=config.train_size, validation_size=held, test_size=held, seed=config.seed)
    model, tokenizer = load(config, seed=config.seed)
    if (kind := kind_of(model)) != "causal":
        raise InputError(f"--model {config.model}: a {kind} model, which writes no answers; name a causal model")
    refuse_rough(model, config.model)
    base = "" if config.dry_run else fingerprint(model)
    transformers.set_seed(config.seed)  # for an adapter's first values
    model = schemes.prepare(model, config.scheme, config.freeze)
    encode = prompt_encoder(model, tokenizer, config)
    train, validation, test = (source.usable(part, encode) for part in (rows.train, rows.validation, rows.test))
    own = ends_of(tokenizer, sorted(ends.of(model)), encode.conversational)
    ends.teach(model, own)  # what stops answers here stops whoever generates with the trained model
    parts = {"train": train, "validation": validation, "test": test}
    made_of: dict[str, Any] = {}
    if not config.dry_run:
        made_of = identity_of_prompts(tokenizer, parts, (config.template, config.chat), base)
    return PreparedReward(
        config=config, task=Rewarded(str(config.data)), model=model, tokenizer=tokenizer, bad=source.bad, base=base,
        unread=source.unread, ends=list(own), made_of=made_of, functions=functions, test_split=rows.test_split,
        given=dict(rows.given), **parts,
    )  # fmt: skip


def prompt_encoder(model: nn.Module, tokenizer: Any, config: RewardConfig) -> PromptEncoder:
    encode = Encoder(tokenizer, length_limit(model), config.max_length, vocabulary=embedding_rows(model))
    return PromptEncoder(tokenizer, encode, template=config.template, chat=config.chat)


def resolved_reward(config: RewardConfig, model: nn.Module) -> RewardConfig:
    """The options with what depends on the model filled in."""
    trained = [param for param in model.parameters() if param.requires_grad]
    filled = config.model_copy(update={"sigma": config.sigma or sigma_of(trained, model)}).filled
    dtype = config.dtype or str(base_dtype(model)).removeprefix("torch.")
    narrow = any(param.dtype.itemsize < 4 for param in trained)
    return filled.model_copy(
        update={
            "dtype": dtype,
            "direction": config.direction or filled.made_method.direction or "gaussian",
            "rounding": config.rounding or ("compensated" if narrow else "nearest"),
            # no forward of a step shares places here, but a record that lacks the key is of a zotune that rounded otherwise
            "forward_tokens": config.forward_tokens or most_tokens(next(model.parameters()).device),
            "eval_every": config.evaluates_every,
            "show_every": config.shows_every,
        }
    )


def short_of_room(prompts: Sequence[Prompt], model: nn.Module, most: int) -> int:
    """How many prompts leave less room than an answer may have."""
    takes = length_limit(model)
    return 0 if takes is None else sum(len(prompt.ids) + most > takes for prompt in prompts)


def _source(config: RewardConfig) -> Source:
    if config.data is not None and config.data.startswith(GYM):
        held = config.eval_size or HELD_OUT
        made = gym_rows(config.data, config.train_size + held, config.seed)
        tables = {"train": made[held:], "validation": made[:held]}
        return find_source(None, None, None, config.columns, config.skip_bad_rows, None, tables)
    return find_source(None, config.data, None, config.columns, config.skip_bad_rows, config.subset, config.tables)
