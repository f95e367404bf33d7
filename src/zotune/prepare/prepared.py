"""What a run begins with: its rows, its model with the scheme on it, and its options with what depends on the model filled in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from zotune.engines.following import most_tokens
from zotune.engines.places import tokens_in
from zotune.errors import InputError
from zotune.estimates.memory import AdamCost, adam_cost
from zotune.methods import find, make_method
from zotune.models import schemes
from zotune.models.quantized import base_dtype, refuse_rough
from zotune.models.schemes import get_scheme
from zotune.options import TrainConfig
from zotune.options.defaults import rounding_by_default
from zotune.prepare.identity import identity
from zotune.prepare.listener import Listener
from zotune.prepare.model import encoder_for, load
from zotune.prepare.placing import Placed, loads_on, placed
from zotune.prepare.ready import Ready
from zotune.record.fingerprints import fingerprint
from zotune.tasks import Task, ends
from zotune.tasks.encoding import Encoded
from zotune.tasks.evaluation import Outcome, outcome
from zotune.tasks.objectives import objective
from zotune.tasks.own import data_of, encoded
from zotune.tasks.splits import TEST_SIZE, VALIDATION_SIZE, Splits, training_splits

LENGTHS = 16  # on CUDA batches are padded to a multiple of so many tokens: a captured step serves one shape


@dataclass(kw_only=True)
class Prepared(Ready):
    """A model with its scheme on, and the rows that it will see."""

    config: TrainConfig
    task: Task
    splits: Splits
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]
    placed: Placed | None = None  # where weights stream

    def score(self, rows: list[Encoded], listener: Listener, what: str) -> float:
        """The task's metric; see `zotune.tasks.metrics`."""
        return self.outcome(rows, listener, what).metric(self.task.metric, rows)

    def outcome(self, rows: list[Encoded], listener: Listener, what: str) -> Outcome:
        """What the model makes of the rows."""
        listener.begin(what, len(rows))
        found = outcome(
            self.model,
            self.tokenizer,
            self.task,
            rows,
            batch_size=2 * self.config.batch_size,
            pad_id=self.pad_id,
            advance=lambda n: listener.advance(what, n),
        )
        listener.end(what)
        return found

    def one_class(self, rows: list[Encoded]) -> float:
        """Percent right by always answering the label that is most frequent among the rows; 0 where nothing is chosen."""
        if self.task.generates or self.task.models:
            return 0.0
        counts: dict[int, int] = {}
        for row in rows:
            counts[row.label] = counts.get(row.label, 0) + 1
        return 100 * max(counts.values()) / len(rows)

    @property
    def cut_rows(self) -> int:
        """Rows that were cut, each once however often it is drawn or scored."""
        drawn, rows = self.splits, [*self.train, *self.validation, *self.test]
        examples = [*drawn.train, *drawn.validation, *drawn.test]
        return len({example.where for example, row in zip(examples, rows, strict=True) if row.cut})

    def adam_cost(self) -> AdamCost:
        longest = max(self.train, key=lambda row: row.tokens)
        asked = objective(self.config.loss, self.task, self.tokenizer, self.pad_id)
        if not asked.differentiable:  # what back-propagation would have to train on instead
            asked = objective("answer", self.task, self.tokenizer, self.pad_id)
        loss, collate = asked.row_loss, asked.collate
        batch = {k: v.to(self.device) for k, v in collate([longest]).items()}
        return adam_cost(self.model, lambda: loss(self.model, batch), self.config.batch_size)


def prepare(config: TrainConfig) -> Prepared:
    """Data first, since it fails fastest; then the model, the scheme on it, and the rows as ids."""
    task, source = data_of(config)
    if config.balance_classes and (task.generates or task.models):
        raise InputError(f"--balance-classes: task {task.name!r} has no classes")
    asked = objective(config.loss, task, None, 0)  # says at once what does not go together
    if ":" in config.loss and task.generates and task.metric == "f1":
        task = replace(task, metric=config.loss)  # what is trained for also says which step is best
    kind = make_method(config.method).kind
    if not asked.differentiable and (kind != "zeroth-order" or config.hybrid):
        raise InputError(
            f"--loss {config.loss}: has no gradient; method {config.method} needs one (answer, candidates)"
        )
    splits = training_splits(
        task,
        source,
        train_size=config.train_size,
        validation_size=min(task.validation_size or VALIDATION_SIZE, config.eval_size or VALIDATION_SIZE),
        test_size=min(TEST_SIZE, config.eval_size or TEST_SIZE),
        seed=config.seed,
        balanced=config.balance_classes,
    )
    model, tokenizer = load(loads_on(config), task, seed=config.seed)
    if kind != "first-order":
        refuse_rough(model, config.model)
    base = "" if config.dry_run else fingerprint(model)
    transformers.set_seed(config.seed)  # for an adapter's first values
    model = schemes.prepare(model, config.scheme, config.freeze)
    encode = encoder_for(model, tokenizer, config, task)
    (train, train_rows), (validation, validation_rows), (test, test_rows) = (
        encoded(encode, source, part) for part in (splits.train, splits.validation, splits.test)
    )
    learned = ends.taught(train_rows, tokenizer, task.end) if task.generates or task.models else set()
    ends.teach(model, learned)
    where = placed(model, config)
    splits = replace(splits, train=train, validation=validation, test=test)
    rows = {"train": train_rows, "validation": validation_rows, "test": test_rows}
    made_of: dict[str, Any] = {}
    if not config.dry_run:
        drawn = {"train": train, "validation": validation, "test": test}
        made_of = identity(task, tokenizer, source, drawn, rows, base, (config.loss, config.method))
    return Prepared(
        config=config,
        task=task,
        model=model,
        tokenizer=tokenizer,
        splits=splits,
        bad=source.bad,
        **rows,
        unread=source.unread,
        base=base,
        made_of=made_of,
        ends=sorted(learned),
        placed=where,
    )


def resolved(ready: Prepared) -> TrainConfig:
    """The options with what depends on the model and its rows filled in, and what the rows told of their task."""
    config, model, task = ready.config, ready.model, ready.task
    scheme, found = get_scheme(config.scheme), find(config.method)
    told = {"template": task.prompt, "label_words": dict(task.words)} if config.task is None and task.words else {}
    method = found.build()
    return config.model_copy(
        update={
            "lr": method.own("lr", config.lr, scheme.default_lr(model)),
            "eps": method.own("eps", config.eps, scheme.eps),
            "direction": config.direction or method.direction or "gaussian",
            "queries": config.directions_a_row if "queries" in found.options else config.queries,
            "dtype": config.dtype or str(base_dtype(model)).removeprefix("torch."),
            "rounding": config.rounding or _rounding(ready),
            "eval_every": config.evaluated(len(ready.validation)),
            **told,
        }
    )


def _rounding(ready: Prepared) -> str:
    if (
        ready.device.type != "cuda"
        or not ready.config.by_default
        or ready.config.weight_decay
        or ready.placed is not None
    ):
        return "nearest"
    params = [*ready.model.parameters()]
    narrow = sum(p.nbytes for p in params if p.requires_grad and p.itemsize < 4)
    memory = torch.cuda.get_device_properties(ready.device).total_memory
    return rounding_by_default(sum(p.nbytes for p in params), narrow, memory)


def taken_by_default(ready: Prepared, given: TrainConfig) -> dict[str, Any]:
    """What a run takes for want of options, with what depends on its model. given: before they were resolved."""
    taken = given.by_default
    return taken | {"rounding": ready.config.rounding} if taken and given.rounding is None else taken


def tokens_together(ready: Prepared) -> int:
    """Tokens of one forward over several places, where nothing is said: what suits the device, and a pair of any piece."""
    config = ready.config
    longest = max(ready.train, key=lambda row: row.tokens)
    multiple = LENGTHS if ready.device.type == "cuda" else 1
    asked = objective(config.loss, ready.task, ready.tokenizer, ready.pad_id, multiple)
    rows = min(config.batch_size, config.micro_batch or config.batch_size)
    most = most_tokens(ready.device) if ready.placed is None else ready.placed.tokens
    return max(most, 2 * tokens_in(asked.collate([longest] * rows)))
