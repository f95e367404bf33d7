"""What a decode step launches for each layer: by a mode that sees torch's operations; kernels are counted and not run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers as tf
from families import GQA
from test_decoders import EPS, MEMBERS, REQUESTS, directions_of
from torch.utils._python_dispatch import TorchDispatchMode

from zotune.decode import Settings
from zotune.decode.cache import layers_of
from zotune.decode.loop import Loop, Reader
from zotune.decode.members import Population
from zotune.decode.seats import MemberWeights
from zotune.engines import parts

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is missing")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter would run")


class Launches(TorchDispatchMode):
    """names: of operations that compute, and of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not func.__name__.startswith(("empty", "new_empty", "_unsafe_view")):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def of_a_step(layers: int, members: bool, monkeypatch) -> Counter[str]:
    launches = Launches()
    monkeypatch.setattr(parts, "KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: launches.names.append(self.fn.__name__)
    )
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**GQA | {"num_hidden_layers": layers})).eval()
    reader, weights = Reader(model, *layers_of(model)), None
    reader.attention.serves = True
    if members:
        weights = MemberWeights(Population(directions_of(model), EPS, 1), len(MEMBERS))
        weights.draw(MEMBERS)
    loop, some = Loop(reader, 3, 40, Settings(4), weights), REQUESTS[5:8] if members else REQUESTS[:3]
    with torch.no_grad():
        loop.prefill(loop.board.seat([0, 1, 2], [0, 1, 2], some, [4] * 3, None), some, max(len(r.prompt) for r in some))
        loop.steps()
        launches.names.clear()
        with launches:
            loop._step()
    return Counter(launches.names)


@pytest.mark.parametrize(("members", "products"), [(False, {"mm.default": 7, "_gated_kernel": 1}),
    (True, {"_products_kernel": 1, "mm.default": 2, "_terms_kernel": 2, "_gated_products_kernel": 1})],
    ids=["plain", "members"])  # fmt: skip
def test_directions_cost_fewer_launches_than_they_save(members, products, monkeypatch):
    """Products of several small maps of one x are one launch, with all that directions add, and so are those that a gate joins."""
    two, one = (of_a_step(layers, members, monkeypatch) for layers in (2, 1))
    others = {"_rms_norm_kernel": 2, "add.Tensor": 2, "_rotary_kernel": 1, "_attend_kernel": 1}
    assert two - one == Counter(products | others)
    assert (one - (two - one)).total() == 12 + members  # beside all layers, whose head has terms
