"""Rules whose update is a list of coefficients, Σ_q c_q·z_q: no tensor of noise or gradient is ever made."""

# Q directions, G parameter groups, K directions over a batch's rows, C copies of a batch.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zotune.record.scalars import float32, mean, shrinkage, spread
from zotune.updates.anchor import pull
from zotune.updates.rule import Rule, State, shrink

if TYPE_CHECKING:
    from torch import Tensor

    from zotune.directions import Displacement, HeldDisplacement
    from zotune.record.steps import StepRecord


@dataclass(frozen=True)
class Linear(Rule):
    """A rule whose update is Σ_q c_q·z_q: a list of coefficients; no tensor as large as the weights, but for an anchor.

    memory: how many numbers a parameter group remembers from step to step, of which the coefficients are made too (`recalled`).
    anchor: k of a decay towards where the weights began, θ ← θ − k·(θ − θ₀) before each update (`zotune.updates.anchor`); θ₀ is
    kept beside θ, once the trainable weights' memory. 0: none.
    """

    anchor: float = 0.0

    linear = True
    capturable = True
    memory = 0

    def coefficients(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        """(Q,) float32: c of each direction. g_Q and lr (0-d): float64, on any device, of float32's values."""
        raise NotImplementedError

    def rounded_coefficients(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        """`coefficients` of g and lr as a run records them, in float32: what is applied is what a replay applies."""
        return self.coefficients(g_Q.float().double(), lr.float().double())

    def recalled(self, g_Q: Tensor, lr: Tensor, memory_M: Tensor) -> tuple[Tensor, Tensor]:
        """`rounded_coefficients`, and what is remembered after this step. memory_M: before it, float64, zeros at first."""
        return self.rounded_coefficients(g_Q, lr), memory_M

    def memories(self, directions: Any, state: State) -> dict[int, Tensor]:
        """(M,) float64 by parameter group, kept beside its first parameter; none for a rule that remembers nothing."""
        import torch

        found: dict[int, Tensor] = {}
        for param in directions.params if self.memory else ():
            group = directions.slots[id(param)].group
            if group not in found:
                own = state[param]
                if "memory" not in own:
                    own["memory"] = torch.zeros(self.memory, dtype=torch.float64, device=param.device)
                found[group] = own["memory"]
        return found

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return self.rounded_coefficients(g_Q, lr)

    def displacement(self, by: StepRecord, memories: Mapping[int, Tensor] | None = None) -> Displacement:
        """The update as a displacement. memories: what the rule remembers, by parameter group, changed in place."""
        import torch

        from zotune.directions import Displacement

        assert memories or not self.memory, "its coefficients are made of steps before this one"
        coefs_GQ, memories = [], memories or {}
        for group, (g_Q, lr) in enumerate(zip(by.g_GQ, by.lr_G, strict=True)):
            held = memories.get(group, torch.zeros(self.memory))
            g, rate = (torch.tensor(x, dtype=torch.float64) for x in (g_Q, lr))
            coefs_Q, after_M = self.recalled(g, rate, held.cpu())
            held.copy_(after_M)
            coefs_GQ.append(tuple(coefs_Q.tolist()))
        return Displacement(by.seeds_Q, tuple(coefs_GQ))

    def apply(self, directions: Any, by: StepRecord, state: State) -> None:
        if self.anchor:
            pull(directions.params, state, self.anchor)
        moved = self.displacement(by, self.memories(directions, state))
        if self.rounding == "compensated":
            factors = [shrinkage(lr, decay) for lr, decay in zip(by.lr_G, by.decay_G, strict=True)]
            self.displace(directions, moved, state, factors)
        else:
            shrink(directions, by)
            self.displace(directions, moved, state)

    def displace(
        self, directions: Any, by: Displacement | HeldDisplacement, state: State, factors: Sequence[float | Tensor] = ()
    ) -> None:
        """θ ← factor·θ + displacement, rounded as the rule rounds; factors by parameter group where rounding is compensated."""
        if self.rounding == "compensated":
            self.reserve(directions.params, state)
            directions.apply_compensated(by, [state[param]["residual"] for param in directions.params], factors)
        else:
            directions.apply(by)


@dataclass(frozen=True)
class Sgd(Linear):
    """c_q = −lr·g_q / Q, so that Σ c_q·z_q = −lr·ĝ with ĝ the mean of the Q estimates.

    lr and g are rounded to float32 first, and so is c: what a run records is exactly what it applied.
    Source: MeZO, arXiv 2305.17333; ZO-SGD in arXiv 2402.11592.
    """

    kernel = "sgd"  # of gradients

    def coefficients(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return (-(lr * g_Q) * (1 / g_Q.numel())).float()

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        return w_n - lr * g_n

    def _by_torch(self, param: Any, gradient: Any, state: State, lr: float, decay: float) -> bool:
        # Beside 16-bit numbers torch rounds alpha, and its product, to 16 bits on a CPU; on CUDA both are float32.
        narrow = param.dtype.itemsize < 4 and not param.is_cuda
        if narrow or not float32(lr) or shrinkage(lr, decay) != 1:
            return False
        param.data.add_(gradient, alpha=-float32(lr))
        state[param]["steps"] = state[param].get("steps", 0) + 1
        return True


@dataclass(frozen=True)
class ScalarSign(Linear):
    """c_q = −lr·sign(g_q) / Q: the sign of the projected gradient, times z. What the public code of arXiv 2402.11592 does."""

    def coefficients(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return (-(lr * g_Q.sign()) * (1 / g_Q.numel())).float()


@dataclass(frozen=True)
class RowNormalised(Sgd):
    """g_i = d_i/((std(d) + ε)·eps·2): each row's difference in units of their spread over the batch, the mean not taken off.

    std: of the K directions over the rows, biased. Where they are all alike, and of one row, they told nothing, and nothing moves.
    The 2·eps stays, so that (1/B) Σ g_i·z_i is the paper's a_i·z_i/(2·σ·B), with a_i of L(θ + σz) − L(θ − σz), twice d.
    Source: GRZO, arXiv 2606.02857.
    """

    epsilon: float = 1e-8

    normalises = True

    def project(self, d_QK: Tensor, eps: Tensor, losses_CK: Tensor) -> Tensor:
        alike = d_QK.amax(1, keepdim=True) == d_QK.amin(1, keepdim=True)  # their spread may be a rounding of the mean
        width = 2 * spread(d_QK, 1) + self.epsilon
        return (2 * d_QK / width / (2 * eps)).where(~alike, d_QK * 0)


@dataclass(frozen=True)
class MeanSquare(Sgd):
    """v ← β·v + (1 − β)·ḡ², one number; c_q = −lr/(√v̂ + ε)·g_q / Q, with ḡ the mean of the g_q and v̂ = v/(1 − βᵗ).

    The rate in units of the size that projected gradients have had: Adam's second moment of the directions, not of the weights.
    A parameter group has a v of its own, as it has an eps. Where all g were 0 so far nothing moves.
    Source: MEAZO, arXiv 2605.03869 (read second hand, its index of t from 1).
    """

    beta: float = 0.999
    epsilon: float = 1e-8

    memory = 2  # v and 1 − βᵗ: the same mean, of g² and of 1

    def recalled(self, g_Q: Tensor, lr: Tensor, memory_M: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        g_Q = g_Q.float().double()
        centre = mean(g_Q)
        after_M = memory_M * self.beta + torch.stack([centre * centre, torch.ones_like(centre)]) * (1 - self.beta)
        root = (after_M[0] / after_M[1]).sqrt() + self.epsilon
        return self.coefficients(g_Q / root, lr.float().double()), after_M

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        import torch

        return torch.cat([g_Q, lr.view(1)])


@dataclass(frozen=True)
class Conservative(Sgd):
    """θ ← the best of {θ, θ − lr·ĝ, θ + lr·ĝ} on the step's own batch; on a tie θ stays. Source: arXiv 2402.11592, ZO-SGD-Cons.

    The choice is 0, 1 or 2, in that order. No decay: it would move θ where the choice is to stay.
    """

    extra_forwards = 3

    def displacement(self, by: StepRecord, memories: Mapping[int, Tensor] | None = None) -> Displacement:
        taken = super().displacement(by, memories)
        if by.choice == 0:
            return taken.some(0, 0)
        return taken if by.choice == 1 else taken.negated()

    def choose(self, losses_3: Tensor) -> Tensor:
        """0-d, in the losses' dtype: the choice among θ, θ − lr·ĝ and θ + lr·ĝ. What is not a number is never chosen.

        No number from the host: a capture could not copy it.
        """
        import torch

        best, choice = losses_3[0], torch.zeros_like(losses_3[0])
        for other in (1, 2):
            better = losses_3[other] < best
            best = torch.where(better, losses_3[other], best)
            choice = torch.where(better, torch.full_like(choice, other), choice)
        return choice

    def apply(self, directions: Any, by: StepRecord, state: State) -> None:
        if by.choice:
            self.displace(directions, self.displacement(by), state)


@dataclass(frozen=True)
class Normalised(Sgd):
    """θ ← θ − lr·scale·(1/Q) Σ_q d_q/std(d)·z_q: the differences in units of their own spread, so that eps cancels.

    scale: a constant of the method's. std: of the Q places of the same rows, biased, which is that of their losses. Where these
    are all alike they told nothing, and nothing moves. Source: FZOO, arXiv 2506.09034; CoPES, arXiv 2608.02391.
    """

    scale: float = 1.0

    normalises = True

    def project(self, d_QK: Tensor, eps: Tensor, losses_CK: Tensor) -> Tensor:
        alike_K = d_QK.amax(0) == d_QK.amin(0)  # their spread may be a rounding of the mean
        return (d_QK / spread(d_QK) * self.scale).where(~alike_K, d_QK * 0)


@dataclass(frozen=True)
class Standardised(Sgd):
    """θ ← θ − lr·(1/Q) Σ_q d_q/std(L)·z_q: the differences in units of the spread of all losses of the same rows, so that eps
    cancels.

    std: of the step's C places of the same rows, biased. For antithetic pairs this is the z-score over all 2Q members: with
    d_q = (L⁺ − L⁻)/2 the mean cancels. Losses that are all alike told nothing, and nothing moves. Source: ES, arXiv 2509.24372.
    """

    normalises = True

    def project(self, d_QK: Tensor, eps: Tensor, losses_CK: Tensor) -> Tensor:
        alike_K = losses_CK.amax(0) == losses_CK.amin(0)
        return (d_QK / spread(losses_CK)).where(~alike_K, d_QK * 0)
