"""What devices sustain, and the seconds that a step takes on one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zotune.estimates.counted import Step
    from zotune.estimates.estimate import Estimate
    from zotune.estimates.needs import Needs


@dataclass(frozen=True)
class Rates:
    """What a device sustains: FLOP/s of a matrix product, bytes/s of a copy, noise elements/s; seconds a call of an operation.

    call: where the host gives one after the other, Python of the model included. node: within a CUDA graph; None where there is
    none. On a card that has graphs the host goes ahead of the device. Both measured with a 135M model beside an H100.
    workspace: bytes of cuBLAS for each of the two streams that a run's products are on, the one at hand and that of captures.
    flops_float32: of float32 without TF32; None where `flops` holds for it.
    """

    flops: float
    bandwidth: float
    noise: float
    memory: int | None = None
    call: float = 2.5e-5
    node: float | None = 1.6e-6
    workspace: int = 8 << 20
    flops_float32: float | None = None
    has_tf32: bool = True

    def of_products(self, dtype: torch.dtype, tf32: bool) -> Rates:
        """Those of products of this dtype."""
        if self.flops_float32 is None or dtype != torch.float32:
            return self
        return replace(self, flops=self.flops / 2 if tf32 and self.has_tf32 else self.flops_float32, flops_float32=None)


# Sustained in a model's forward pass, bfloat16, and float32; H100 measured, the others scaled by their data sheets.
CARDS = {
    "h100": Rates(520e12, 2.98e12, 1.2e12, 80 * 2**30, workspace=32 << 20, flops_float32=50e12),
    "h200": Rates(520e12, 4.2e12, 1.2e12, 141 * 2**30, workspace=32 << 20, flops_float32=50e12),
    "a100": Rates(200e12, 1.8e12, 0.7e12, 80 * 2**30, flops_float32=15e12),
    "l4": Rates(60e12, 0.27e12, 0.25e12, 24 * 2**30, flops_float32=15e12),
    "rtx4090": Rates(110e12, 0.9e12, 0.6e12, 24 * 2**30, flops_float32=55e12),
    "rtx3090": Rates(50e12, 0.8e12, 0.3e12, 24 * 2**30, flops_float32=20e12),
    "t4": Rates(25e12, 0.27e12, 0.1e12, 16 * 2**30, flops_float32=5e12, has_tf32=False),
}


# Kernels for each call of a plain forward, of SmolLM2-135M's captured steps on an H100: 24.6 ms a masked one, 30 by forward mode.
MASKED_KERNELS = 2
DERIVED_KERNELS = 5
WIDENED_BYTES = (
    24  # read and written of an element, beside its update, to widen weights and gradient and to narrow the weights
)
# Forward mode writes each value and reads it once or twice: of OPT-1.3B, LLaMA-7B and OPT-13B on an H100, within 15 %. So does a
# forward of many rows with directions of their own, whose products no longer hide it: of SmolLM2-135M, OPT-1.3B and LLaMA-7B at 128
# and 512 places, and the first at 2,048, on an H200, 0.81 to 1.16 of the measured step.
DERIVED_COPIES = 2.5


def _product_seconds(made: Estimate, rates: Rates) -> float:
    return max(made.flops / rates.flops, made.weights / rates.bandwidth)


def _given(work: float, calls: int, rates: Rates) -> float:
    """Seconds of a device's work and of the host that gives it these calls: a card works while the host goes on."""
    host = calls * rates.call
    return work + host if rates.node is None else max(work, host)


def forward_seconds(made: Estimate, rates: Rates) -> float:
    """Of one forward pass of the batch, given one operation at a time."""
    return _given(_product_seconds(made, rates), made.calls, rates)


def step_seconds(
    made: Estimate,
    of_step: Step,
    needs: Needs,
    rates: Rates,
    *,
    places: int = 2,
    widened: bool = False,
    checkpointing: bool = False,
    masked: bool = False,
    by_rows: bool = False,
) -> float:
    """A roofline: products at the sustained rate, weights and state at that of a copy, noise drawn for each probe and the update.

    First order: forward, the gradients of activations and (where trained) of weights; checkpointing adds a forward, and is no
    graph. On a card the others are, in which so many places share their calls, but for masked ones. Forward mode: the
    product, that of the activations' tangents and (where trained) of the weights', and its values, scores of attention among them.
    """
    trained_bytes = of_step.trained_bytes
    whole = trained_bytes > made.weights / 2
    product, forwards = _product_seconds(made, rates), made.forwards
    if needs.kind == "first-order":
        passes = (3 if whole else 2) + (1 if checkpointing else 0)
        update = 3 * trained_bytes + 2 * made.state + WIDENED_BYTES * widened * made.trainable
        work, calls = passes * product + update / rates.bandwidth, passes * made.calls
        return _given(work, calls, rates) if checkpointing or rates.node is None else work + calls * rates.node
    copies = 2 * trained_bytes / rates.bandwidth + made.trainable / rates.noise
    if needs.kind == "forward-mode":
        values = DERIVED_COPIES * of_step.written / rates.bandwidth
        work, calls = forwards * ((3 if whole else 2) * product + values) + copies, forwards * made.calls
        return work + (2 * calls * rates.call if rates.node is None else DERIVED_KERNELS * calls * rates.node)
    each = product + copies
    if by_rows:  # directions are factors: no copy of the weights is made, but for the update's
        each = product + DERIVED_COPIES * of_step.written / places / rates.bandwidth
    work = forwards * each + copies + 2 * made.state / rates.bandwidth
    if rates.node is None:
        return work + forwards * made.calls * rates.call
    return work + (MASKED_KERNELS * forwards if masked else -(-forwards // places)) * made.calls * rates.node


_measured: dict[str, Rates] = {}


def rates_here(device: str = "auto") -> Rates:
    """This machine's rates: a card's by its name, else measured in a tenth of a second."""
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name = properties.name.lower().replace(" ", "")
        known = next((rates for card, rates in CARDS.items() if card in name), CARDS["a100"])
        return replace(known, memory=properties.total_memory)
    if "cpu" not in _measured:
        _measured["cpu"] = _measure_cpu()
    return _measured["cpu"]


def _measure_cpu() -> Rates:
    def best(work: Callable[[], Any]) -> float:
        took = []
        for _ in range(8):  # the best of some: others may use the processor too
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
        return min(took)

    a = torch.randn(512, 512)
    flat = torch.zeros(8 << 20)
    product, copy = best(lambda: a @ a), best(lambda: flat.clone())
    threads = torch.get_num_threads()
    if threads > 1:  # beside other programs, threads that wait for one another may be slower for a while than one alone
        try:
            torch.set_num_threads(1)
            product, copy = min(product, best(lambda: a @ a)), min(copy, best(lambda: flat.clone()))
        finally:
            torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Gaussian noise: 0.105 s for 135 M elements on two threads.
    return Rates(2 * 512**3 / product, 2 * flat.nbytes / copy, 0.65e9 * threads, memory, 1e-5, None)
