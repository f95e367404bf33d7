"""What a decoder is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen and where an answer ends. All of it: nothing of a checkpoint's `generation_config` enters.

    temperature: 0 is greedy. top_k, top_p: what is drawn from, the k likeliest tokens, then the fewest that have p of these
    together; not beside 0. ends: tokens that end an answer. pad: stands where a row has no token. Raises ValueError.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ends: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: an answer has at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: has to be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: has to be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: has to be over 0 and at most 1")


class Member(NamedTuple):
    """A perturbed model: θ + sign·ε·z(seed). sign: −1 or +1."""

    seed: int
    sign: int


@dataclass(frozen=True)
class Request:
    """A prompt, of at least one token, and who is to answer it.

    row: the prompt's number in the step, which the draws depend on; the same prompt of several members has one row.
    member: a number in `members`; −1: the unperturbed model.
    """

    prompt: tuple[int, ...]
    row: int
    member: int = -1


@dataclass(frozen=True)
class Answer:
    """tokens: what was written, without the token that ended it. finished: it ended by itself. finite: all logits were numbers."""

    tokens: tuple[int, ...]
    finished: bool
    finite: bool = True


class Decoder(Protocol):
    """name: see `zotune.decode.DECODERS`."""

    @property
    def name(self) -> str: ...

    def generate(
        self,
        requests: Sequence[Request],
        members: Sequence[tuple[int, int]],
        *,
        settings: Settings,
        seed: int,
        step: int,
        advance: Callable[[int], None] = lambda answers: None,
    ) -> list[Answer]:
        """The answer of each request, in their order. The model is in eval mode meanwhile; weights are as they were.

        A draw is a function of (seed, step, row, position in the answer) alone, the same for all members (`decode.choosing`).
        An answer is cut where the model takes no more tokens. advance: told how many answers are new.
        Raises InputError, which names the row, for a prompt without a token or without room for one more.
        """
        ...
