"""What the scalars of a run say about its settings: each warning once, with what to change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, median, pstdev

WINDOW = 20  # steps that a judgement looks at
ULPS = 4  # two losses closer than so many roundings of float32 say nothing of the direction
FLOAT32_EPS = 2.0**-23
LARGE = 0.5  # of the loss: probes that far apart see more than a slope
FAR = 2.0  # times the first window's loss


class Guards:
    """Sees each step's two losses and projected gradients. say: told a warning, at most once of each kind."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._differences: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._start: float | None = None
        self.g: list[float] = []  # since the last line of metrics

    def see(self, step: int, loss_plus: float, loss_minus: float, g_Q: Sequence[float]) -> None:
        """A step that was applied; one whose loss is not finite is not for this."""
        loss = (loss_plus + loss_minus) / 2
        self._losses.append(loss)
        self._differences.append(abs(loss_plus - loss_minus))
        self.g += g_Q
        if len(self._losses) < WINDOW:
            return
        now, apart = median(self._losses), median(self._differences)
        if self._start is None:
            self._start = now
        if apart <= ULPS * FLOAT32_EPS * abs(now):
            self._warn("small", f"step {step}: the two losses differ by rounding alone; try a larger --eps")
        elif apart > LARGE * abs(now) > 0:
            share = f"{100 * apart / abs(now):.0f} %"
            self._warn("large", f"step {step}: the two losses lie {share} of the loss apart; try a smaller --eps")
        if now > FAR * abs(self._start) > 0:
            risen = f"from {self._start:.3g} to {now:.3g}"
            self._warn("far", f"step {step}: the loss has risen {risen}; try a smaller --lr, or stop here")

    def statistics(self) -> dict[str, float]:
        """Mean of |g| and spread of g since the last call, for a line of metrics."""
        g, self.g = self.g, []
        return {"g_mean_abs": fmean(map(abs, g)), "g_sd": pstdev(g)} if g else {}

    def _warn(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(line)
