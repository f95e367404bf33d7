"""What the scalars of a run say about its settings: each warning once, with what to change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 20  # steps that a judgement looks at
ULPS = 4  # two losses closer than so many roundings of float32 say nothing of the direction
FLOAT32_EPS = 2.0**-23
LARGE = 0.5  # of the loss: probes that far apart see more than a slope
FAR = 2.0  # times the loss there was: of the weights that probes were taken from, or of the first window
LOST = 0.25  # of the weights: so many that a displacement of eps does not move, and probes are no longer along z
SAMPLE = 4096  # elements of a tensor


class Guards:
    """Sees each step's two losses and projected gradients. say: told a warning, at most once of each kind."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._differences: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self._start: float | None = None
        self.g: list[float] = []  # since the last line of metrics
        self.at_rest: float | None = None  # the next step's loss at the weights themselves, if it is known
        self.apart: list[float] = []  # likewise: |L(θ + ε·z) − L(θ − ε·z)|

    def see(self, step: int, loss_plus: float, loss_minus: float, g_Q: Sequence[float]) -> None:
        """A step that was applied; one whose loss is not finite is not for this."""
        loss = (loss_plus + loss_minus) / 2
        if self._first is None:
            self._first = loss
        if self.at_rest is not None and loss > FAR * abs(self.at_rest) > 0:
            seen = f"{loss:.3g} where the weights themselves have {self.at_rest:.3g}"
            self._warn("large", f"step {step}: the probes' loss is {seen}; try a smaller --eps")
        self.at_rest = None
        self._losses.append(loss)
        self._differences.append(abs(loss_plus - loss_minus))
        self.g += g_Q
        self.apart.append(abs(loss_plus - loss_minus))
        if len(self._losses) < WINDOW:
            return
        now, apart = median(self._losses), median(self._differences)
        if self._start is None:
            self._start = now
        past = self._start if now > FAR * abs(self._start) else self._first  # where it had risen in the first window
        if now > min(FAR * abs(self._start), FAR * FAR * abs(self._first)) > 0:
            risen = f"from {past:.3g} to {now:.3g}"
            self._warn("far", f"step {step}: the loss has risen {risen}; try a smaller --lr, or stop here")
        elif apart <= ULPS * FLOAT32_EPS * abs(now):
            self._warn("small", f"step {step}: the two losses differ by rounding alone; try a larger --eps")
        elif (
            apart > LARGE * max(abs(now), abs(self._start)) > 0
        ):  # a loss that has fallen makes any difference look large
            share = f"{100 * apart / abs(now):.0f} %"
            self._warn("large", f"step {step}: the two losses lie {share} of the loss apart; try a smaller --eps")

    def statistics(self) -> dict[str, float]:
        """Mean of |g|, spread of g and mean distance of the two losses since the last call, for a line of metrics."""
        (g, self.g), (apart, self.apart) = (self.g, []), (self.apart, [])
        return {"g_mean_abs": fmean(map(abs, g)), "g_sd": pstdev(g), "loss_apart": fmean(apart)} if g and apart else {}

    def weigh(self, params: Iterable[Tensor], eps: float) -> None:
        """Before the first step: whether the weights' dtype can hold what a probe adds to them, by a sample of each tensor."""
        lost, count, dtypes = 0.0, 0, set[str]()
        for param in params:
            flat = param.detach().reshape(-1)
            w_n = flat[:: max(1, flat.numel() // SAMPLE)]
            still = ((w_n.double() + eps).to(w_n.dtype) == w_n) & ((w_n.double() - eps).to(w_n.dtype) == w_n)
            lost += float(still.double().mean()) * flat.numel() if flat.numel() else 0.0
            count += flat.numel()
            dtypes.add(str(param.dtype).removeprefix("torch."))
        if count and lost > LOST * count:
            share = f"{100 * lost / count:.0f} % of the weights"
            self._warn(
                "lost",
                f"eps {eps:g} is lost in the rounding of {share} ({', '.join(sorted(dtypes))}); try a larger --eps",
            )

    def _warn(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(line)
