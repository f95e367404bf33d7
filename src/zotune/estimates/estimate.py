"""Memory and time of a configuration from the model's config alone: the real step, on tensors that have no storage.

The model is built on the meta device and the step (a probe, or forward and backward) runs on it, while every storage that would
have been allocated is counted until it is freed. What the meta device cannot show is added: the state of the method, the
scratch that the engine keeps, and on a card cuBLAS's workspaces.
"""

# B rows, T tokens, K answer positions.

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from zotune.directions import Directions, Displacement
from zotune.engines import ENGINES
from zotune.engines.dual import WORTH_ON_CPU, is_small, plan
from zotune.engines.forward_mode import ForwardModeEngine
from zotune.engines.scratch import SMALL_BYTES, Scratch
from zotune.engines.sequential import SequentialEngine
from zotune.errors import InputError, nearest
from zotune.models.border import reading
from zotune.models.kinds import fits
from zotune.models.loading import DTYPES
from zotune.tasks.scoring import ROW_LOSSES
from zotune.updates import TILE

METHODS = (
    "zo-sgd", "zo-sgd-mmt", "zo-sgd-sign", "zo-sgd-cons", "zo-adam", "forward-grad", "fo-sgd", "fo-adam",
)  # fmt: skip
SCHEMES = ("full", "lora", "prefix", "prompt", "head")
VIRTUAL_TOKENS = {"prefix": 5, "prompt": 10}
STATE_BYTES = {"float32": 4, "bfloat16": 2}  # of an element; "parameter": those of the weight
# On the CPU a run's peak is its process's, libraries included: Python, torch, transformers' Trainer, PEFT, numba on Linux. A
# fork of a process that has imported them, as runs of the benchmark are there, maps only the pages that it touches.
PROCESS_BYTES, FORK_BYTES = 790 << 20, 630 << 20
NF4_BYTES = (4 + 8 / 64 + 32 / 64 / 256) / 8  # 4 bits, a quantised scale for each block of 64, a scale of 256 scales


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and counts. `activations` is the peak less all that is named: scratch and workspaces of a step included."""

    method: str
    scheme: str
    variant: str
    weights: int
    gradients: int
    state: int
    activations: int
    trainable: int
    flops: float
    calls: int
    forwards: int
    peak: int
    step_seconds: float | None = None
    state_dtype: str = "float32"  # "parameter" where it is that of the weights


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


def model_config(source: str | Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """The config of a hub name, a folder, a config.json, or `{random: {model_type, …}}`. Raises InputError."""
    import transformers

    if not isinstance(source, str):
        given = dict(source["random"])
        try:
            return transformers.AutoConfig.for_model(**given)
        except (ValueError, TypeError) as error:
            raise InputError(f"random model: {str(error).splitlines()[0]}") from None
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".json"
    if looks_local and not path.exists():
        raise InputError(f"--model {source}: no such file or folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model {source}: no config.json in it")
    with reading(f"--model {source}", path if path.exists() else source):
        config = transformers.AutoConfig.from_pretrained(
            str(path) if path.exists() else source, trust_remote_code=trust_remote_code
        )
    if not fits(config, "causal"):
        named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise InputError(f"--model {source}: a {named} is no causal language model, and no others are estimated")
    return config


def without_dropout(config: Any) -> None:
    """Set a config's dropouts to 0, and no key-value cache."""
    for key, value in list(vars(config).items()):
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, without dropout: methods without back-propagation use none, and it must not differ here."""
    import transformers

    without_dropout(config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def estimate(
    config: Any,
    *,
    method: str = "zo-sgd",
    scheme: str = "full",
    batch_size: int = 16,
    seq_len: int = 256,
    dtype: str | None = None,
    checkpointing: bool = False,
    quantised: bool = False,
    answer_tokens: int = 1,
    queries: int = 1,
    estimator: str = "two-sided",
    state_dtype: str | None = None,
    rounding: str = "nearest",
    rates: Rates | None = None,
    masked: bool = False,
    engine: str = "auto",
    tf32: bool = False,
) -> Estimate:
    """Peak bytes and seconds of a training step of zotune.

    config: of transformers, as `model_config` gives it; it is not altered. checkpointing: of activations, first order alone.
    quantised: the base model's linear layers as NF4 (QLoRA). answer_tokens: positions with logits, K.
    state_dtype: as of `zotune train`, float32 by default; "parameter" is what torch's Adam keeps. masked: whether directions
    are sparse. engine: as of `zotune train`; "auto" is dual where that is worth it, on a CPU for small batches. tf32: whether a
    card takes float32 products by TF32.
    Time is that of steps which are CUDA graphs, as those of zeroth order are on a card. Raises InputError.
    """
    import copy

    from zotune.methods import METHODS as OURS

    asked = ((method, METHODS, "method"), (scheme, SCHEMES, "scheme"), (engine, ("auto", *ENGINES), "engine"))
    for value, known, what in asked:
        if value not in known:
            raise InputError(f"--{what} {value}: {nearest(value, known)}")
    kind = DTYPES[dtype] if dtype else (getattr(config, "dtype", None) or torch.float32)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < seq_len:
        raise InputError(f"--seq-len {seq_len}: the model takes {limit} tokens")
    rates = rates.of_products(kind, tf32) if rates else None
    on_card = rates is not None and rates.node is not None
    # Methods with the same passes differ in their state alone.
    passes = method if method == "forward-grad" else "first" if method.startswith("fo-") else "probe"
    if passes == "probe" and estimator == "two-sided" and not masked:
        worth = on_card or batch_size * seq_len <= WORTH_ON_CPU
        chosen = ("dual" if worth else "sequential") if engine == "auto" else engine
        passes = passes if chosen == "sequential" else chosen
    of = (kind, scheme, passes, on_card, batch_size, seq_len, answer_tokens, checkpointing, quantised)
    key = (config.to_json_string(), *of)
    if key not in _counted:
        _counted[key] = _count(copy.deepcopy(config), *of)
    of_step = _counted[key]
    rule = OURS[method].build().rule
    state_dtype = state_dtype or "float32"
    state = of_step.trained_bytes if state_dtype == "parameter" else STATE_BYTES[state_dtype] * of_step.trainable
    state = rule.state_copies * state + of_step.trained_bytes * (rounding == "compensated")
    narrow, widened, tiles = kind != torch.float32, 0, 0
    alike = state_dtype == "parameter" or DTYPES[state_dtype] == kind if rule.state_copies else on_card or not narrow
    if passes == "first" and rounding == "nearest" and (alike or (rule.state_copies and state_dtype == "float32")):
        widened = 0 if alike else 2  # weights and gradient, for torch's own kernel
    elif passes == "first" or not (rule.linear or rule.extra_forwards):  # what the rule's arithmetic on a tile takes
        copies = rule.state_copies * (state_dtype == "bfloat16" or (state_dtype == "parameter" and narrow))
        tiles = 3 + narrow + (narrow or passes != "first") + copies
    tiles = 4 * min(TILE, of_step.largest) * (tiles + widened)
    gradients = of_step.trained_bytes if passes == "first" else 0
    step = max(of_step.peak, gradients + tiles) + (2 * rates.workspace if rates is not None and on_card else 0)
    made = Estimate(
        method, scheme, " ".join(["NF4"] * quantised + ["checkpointing"] * checkpointing), of_step.weights, gradients, state,
        step - gradients, of_step.trainable, of_step.flops, of_step.calls + 2 * of_step.tensors,
        _forwards(method, queries, estimator), of_step.weights + state + step,
        state_dtype="parameter" if STATE_BYTES.get(state_dtype) == kind.itemsize else state_dtype,
    )  # fmt: skip
    if not rates:
        return made
    return replace(made, step_seconds=_seconds(made, of_step, widened > 0, checkpointing, rates, masked))


@dataclass(frozen=True)
class _Counted:
    """weights, trained_bytes: bytes; trainable, largest: elements of all that trains, of the largest tensor of it; tensors:
    how many. flops, calls: of a plain forward. peak: bytes of a step beside the weights. written: bytes that it writes in all.
    """

    weights: int
    trainable: int
    trained_bytes: int
    tensors: int
    largest: int
    flops: float
    calls: int
    peak: int
    written: int


_counted: dict[tuple[Any, ...], _Counted] = {}
_costs: dict[tuple[Any, ...], tuple[float, int]] = {}  # FLOP and calls of a forward, whatever the step


def _count(
    config: Any,
    kind: torch.dtype,
    scheme: str,
    passes: str,
    on_card: bool,
    batch_size: int,
    seq_len: int,
    answer_tokens: int,
    checkpointing: bool,
    quantised: bool,
) -> _Counted:
    model, extra = with_scheme(build(config, kind), scheme, tangents=passes == "forward-grad")
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = _batch(batch_size, seq_len + extra, answer_tokens)
    loss = lambda: ROW_LOSSES["answer"](model, batch).mean()  # noqa: E731
    held = 0
    shape = (config.to_json_string(), kind, scheme, passes == "forward-grad", batch_size, seq_len, answer_tokens)
    if shape not in _costs:
        _costs[shape] = _forward_cost(model, loss)
    flops, calls = _costs[shape]
    # forward mode has a derivative of the plain formula alone
    attention = nullcontext() if passes == "forward-grad" else _fused_attention()
    with attention, Allocations(model) as live:
        if passes == "first":
            with set_checkpoint_early_stop(False):  # the exception that stops would keep alive what was recomputed
                kept = _forward(model, loss, checkpointing)
            kept.backward()
        elif passes == "forward-grad":
            engine = ForwardModeEngine(_Still([_trainable(model)]))
            engine.derivative(loss, Displacement((0,), ((1.0,),)))
        elif passes in ("dual", "lowrank"):
            tokens = batch_size * (seq_len + extra)
            held = _copies_bytes(model, tokens, batch_size * answer_tokens, on_card, whole=passes == "dual")
            batch = _batch(2 * batch_size, seq_len + extra, answer_tokens)
            with torch.no_grad():
                loss()
        else:
            held = _probe(model, loss, live)
    step = live.peak + held
    if quantised:
        saved, scratch = _quantised(model)
        weights -= saved
        step += scratch
    sizes = [p.numel() for p in trained]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    return _Counted(weights, sum(sizes), trained_bytes, len(sizes), max(sizes), flops, calls, step, live.written)


def compare(config: Any, chosen: Mapping[str, Any], **common: Any) -> list[Estimate]:
    """What was asked for, then plain ZO, LoRA, LoRA with checkpointing, QLoRA and full Adam beside it.

    First order beside it is at its cheapest: Adam's moments in the weights' dtype, as torch's are.
    """
    adam = {"method": "fo-adam", "state_dtype": "parameter"}
    rows: list[dict[str, Any]] = [
        dict(chosen),
        {"method": "zo-sgd", "scheme": "full"},
        {"method": "zo-adam", "scheme": "full"},
        adam | {"scheme": "lora"},
        adam | {"scheme": "lora", "checkpointing": True},
        adam | {"scheme": "lora", "checkpointing": True, "quantised": True},
        adam | {"scheme": "full"},
        adam | {"scheme": "full", "checkpointing": True},
    ]
    made = [estimate(config, **(common | row)) for row in rows]
    return [row for i, row in enumerate(made) if row not in made[:i]]


# Options of a run that `estimate_for` reads.
READ = (
    "method", "scheme", "batch_size", "tokens", "answer_tokens", "dtype", "checkpointing", "queries", "estimator",
    "state_dtype", "rounding", "sparsity", "mask", "engine", "tf32", "device", "blocks", "hybrid", "quantize", "groups",
)  # fmt: skip


def estimate_for(source: str | Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes and seconds a step of one run of a suite, on this machine; rows of 64 tokens where their length is not known.

    Nothing for what `estimate` does not count.
    """
    options = {name: options[name] for name in READ if options.get(name) is not None}
    if not counted(options):
        return {}
    config = model_config(source)
    limit = getattr(config, "max_position_embeddings", None) or 64
    on_gpu = torch.cuda.is_available() and options.get("device") != "cpu"
    made = estimate(
        config,
        method=options["method"],
        scheme=options.get("scheme", "full"),
        batch_size=int(options.get("batch_size") or 16),
        seq_len=int(options.get("tokens") or min(64, limit)),
        dtype=options.get("dtype"),
        checkpointing=bool(options.get("checkpointing")),
        queries=int(options.get("queries") or 1),
        estimator=options.get("estimator") or "two-sided",
        state_dtype=options.get("state_dtype"),
        rounding=options.get("rounding") or "nearest",
        answer_tokens=int(options.get("answer_tokens") or 1),
        rates=rates_here(options.get("device", "auto")),
        masked=bool(options.get("sparsity")),
        tf32=bool(options.get("tf32")),
        # a probe on a CPU steps without a batch, which one forward would need
        engine="sequential" if not on_gpu and "tokens" in options else options.get("engine") or "auto",
    )
    process = FORK_BYTES if sys.platform == "linux" else PROCESS_BYTES
    process = 0 if on_gpu or "tokens" in options else process
    return {"peak_bytes": made.peak + process, "step_seconds": made.step_seconds}


def counted(options: Mapping[str, Any]) -> bool:
    """Whether `estimate` knows a step of these options: not blocks, hybrid training, kept masks, several directions."""
    others = [options.get(name) for name in ("blocks", "hybrid", "quantize")]
    kept = options.get("mask") in ("magnitude", "wanda")
    return not any(others) and not kept and str(options.get("groups") or 1) == "1"


def with_scheme(model: nn.Module, scheme: str, tangents: bool = False) -> tuple[nn.Module, int]:
    """The meta model with the scheme's parameters on it, and the tokens that it adds to each row.

    Prefix and prompt start from activations or embeddings, which a model without values has not: their sizes stand in.
    tangents: whether a forward will carry derivatives.
    """
    from zotune.models.schemes import SCHEMES as OURS

    if scheme in OURS and scheme not in VIRTUAL_TOKENS:
        return OURS[scheme].prepare(model), 0
    model.requires_grad_(False)
    config: Any = getattr(model.config, "text_config", model.config)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if scheme == "head":
        head.weight = nn.Parameter(torch.empty_like(head.weight))  # type: ignore[arg-type]  # untied
        return model, 0
    layers, width = config.num_hidden_layers, config.hidden_size
    if scheme == "prefix":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or width // config.num_attention_heads
        count = 2 * layers * VIRTUAL_TOKENS["prefix"] * heads * size
    else:
        count = VIRTUAL_TOKENS["prompt"] * width
    virtual = nn.Parameter(torch.empty(count, dtype=head.weight.dtype, device="meta"))  # type: ignore[arg-type]
    model.register_parameter("virtual_tokens", virtual)
    # What follows the virtual tokens depends on them: autograd keeps its activations, forward mode gives each a tangent.
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    table.register_forward_hook(
        lambda module, args, out: out + 0 * virtual[0] if tangents or torch.is_grad_enabled() else out
    )
    return model, VIRTUAL_TOKENS["prompt"] if scheme == "prompt" else 0


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make, until they are freed; the model's own are not counted.

    Rounded to 512, as CUDA's allocator does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.now = self.peak = self.written = self.calls = 0
        self._ignore = False
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A model asks for a value: whether a batch is plain (not packed, not padded). It is.
            return args[0].dtype == torch.bool
        self.calls += 1
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._own:
            return
        if self._ignore:
            self._own.add(key)
            weakref.finalize(storage, self._own.discard, key)
            return
        size = -(-storage.nbytes() // 512) * 512
        self.now += size
        self.written += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._freed, key, size)

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """What is made inside is never counted."""
        self._ignore = True
        yield
        self._ignore = False

    def _freed(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


class _Still(Directions):
    """Directions that are drawn nowhere."""

    def displaced(self, param: Any, by: Any, out: Tensor) -> Tensor:
        return out

    def displaced_span(self, param: Any, first: int, last: int, by: Any, out: Tensor) -> Tensor:
        return out

    def displaced_rows(self, param: Any, rows_K: Tensor, by: Any, out: Tensor, update: Any = None) -> Tensor:
        return out

    def _add(self, *args: Any, **kwargs: Any) -> None:
        pass


class _CountedScratch(Scratch):
    """A pool of which only the size is wanted: the most bytes in use at one time, which the real one keeps."""

    def __init__(self, live: Allocations) -> None:
        super().__init__()
        self.live, self.most, self._sizes = live, 0, dict[int, int]()

    def take(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if size < SMALL_BYTES:
            return super().take(like)
        with self.live.ignored():
            taken = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._sizes[id(taken)] = size
        self.most = max(self.most, sum(self._sizes.values()))
        return taken

    def give(self, tensor: Tensor) -> None:
        self._sizes.pop(id(tensor), None)

    forget = give


def _probe(model: nn.Module, loss: Callable[[], Tensor], live: Allocations) -> int:
    """One probe by the sequential engine; the bytes of scratch that it keeps."""
    engine = SequentialEngine(_Still([_trainable(model)]))
    engine._unread = []
    engine.scratch = scratch = _CountedScratch(live)
    engine.loss(loss, Displacement((0,), ((1.0,),)))
    return scratch.most


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _copies_bytes(model: nn.Module, tokens: int, answers: int, on_card: bool, whole: bool) -> int:
    """Both copies of all small parameters, and with `whole`, as of dual, of the largest tile of a product with so many tokens.

    answers: positions that the output head sees.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    small, largest = sum(p.numel() * p.element_size() for p in trained if is_small(p)), 0
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules() if whole else ():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter):  # of a table rows alone are read
            continue
        if weight.requires_grad and weight.dim() == 2 and not is_small(weight):
            has_bias = getattr(module, "bias", None) is not None
            rows, _ = plan(weight, answers if module is head else tokens, has_bias, on_card)
            largest = max(largest, rows * weight.shape[1] * weight.element_size())
    return 2 * (small + largest)


def _forward_cost(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, int]:
    """FLOPs and operations of one forward."""
    # On its own: the counter's hooks keep tensors alive, which would be counted.
    with (
        torch.no_grad(),
        _fused_attention() as attention,
        FlopCounterMode(display=False) as products,
        Allocations(model) as made,
    ):
        loss()
    return products.get_total_flops() + sum(attention), made.calls


def _forward(model: nn.Module, loss: Callable[[], Tensor], checkpointing: bool) -> Tensor:
    """The loss, with what autograd keeps for its gradients."""
    inner: Any = model
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    return loss()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[list[float]]:
    """Scaled dot-product attention as the fused kernels do it: no scores are kept. Gives the FLOPs of each call.

    A mode would do but for the recomputation of a checkpoint, which runs outside of all modes.
    """
    flops: list[float] = []
    real = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flops.append(4 * query.numel() * key.shape[-2] / 2)  # causal
        return _Fused.apply(query, key, value)

    F.scaled_dot_product_attention = attend
    try:
        yield flops
    finally:
        F.scaled_dot_product_attention = real


def _batch(rows: int, tokens: int, answer_tokens: int) -> dict[str, Tensor]:
    """What `Collator("answer", …)` makes, without values."""
    shape = (rows, answer_tokens)
    return {
        "input_ids": torch.zeros((rows, tokens), dtype=torch.long, device="meta"),
        "positions": torch.zeros(shape, dtype=torch.long, device="meta"),
        "targets": torch.zeros(shape, dtype=torch.long, device="meta"),
        "target_mask": torch.zeros(shape, device="meta"),
    }


def _quantised(model: nn.Module) -> tuple[int, int]:
    """Bytes that NF4 saves on the linear layers (not the head, not an adapter), and of the largest of them, dequantised."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weights = [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad and "lora_" not in name
    ]
    sizes = [w.numel() * w.element_size() for w in weights]
    kept = sum(int(w.numel() * NF4_BYTES) for w in weights)
    return sum(sizes) - kept, max(sizes, default=0)


def _forwards(method: str, queries: int, estimator: str) -> int:
    from zotune.estimates.cost import forwards_a_step

    return forwards_a_step({"method": method, "queries": queries, "estimator": estimator})


def forward_seconds(made: Estimate, rates: Rates) -> float:
    """Of one forward pass of the batch, given one operation at a time."""
    return _given(_product_seconds(made, rates), made.calls, rates)


def _product_seconds(made: Estimate, rates: Rates) -> float:
    return max(made.flops / rates.flops, made.weights / rates.bandwidth)


# Kernels for each call of a plain forward, of SmolLM2-135M's captured steps on an H100: 24.6 ms a masked one, 30 by forward mode.
MASKED_KERNELS = 2
DERIVED_KERNELS = 5
WIDENED_BYTES = (
    24  # read and written of an element, beside its update, to widen weights and gradient and to narrow the weights
)
# Forward mode writes each value and reads it once or twice: of OPT-1.3B, LLaMA-7B and OPT-13B on an H100, within 15 %.
DERIVED_COPIES = 2.5


def _given(work: float, calls: int, rates: Rates) -> float:
    """Seconds of a device's work and of the host that gives it these calls: a card works while the host goes on."""
    host = calls * rates.call
    return work + host if rates.node is None else max(work, host)


def _seconds(
    made: Estimate, of_step: _Counted, widened: bool, checkpointing: bool, rates: Rates, masked: bool
) -> float:
    """A roofline: products at the sustained rate, weights and state at that of a copy, noise drawn for each probe and the update.

    First order: forward, the gradients of activations and (where trained) of weights; checkpointing adds a forward. On a card the
    others are graphs, in which both probes of a pair share their calls (engine `dual`), but for masked ones. Forward mode: the
    product, that of the activations' tangents and (where trained) of the weights', and its values, scores of attention among them.
    """
    trained_bytes = of_step.trained_bytes
    whole = trained_bytes > made.weights / 2
    product, forwards = _product_seconds(made, rates), made.forwards
    if made.method.startswith("fo-"):
        passes = (3 if whole else 2) + (1 if checkpointing else 0)
        update = 3 * trained_bytes + 2 * made.state + WIDENED_BYTES * widened * made.trainable
        work = passes * product + update / rates.bandwidth
        return _given(work, passes * made.calls, rates)
    copies = 2 * trained_bytes / rates.bandwidth + made.trainable / rates.noise
    if made.method == "forward-grad":
        values = DERIVED_COPIES * of_step.written / rates.bandwidth
        work, calls = forwards * ((3 if whole else 2) * product + values) + copies, forwards * made.calls
        return work + (2 * calls * rates.call if rates.node is None else DERIVED_KERNELS * calls * rates.node)
    work = forwards * (product + copies) + copies + 2 * made.state / rates.bandwidth
    if rates.node is None:
        return work + forwards * made.calls * rates.call
    return work + (MASKED_KERNELS * forwards if masked else -(-forwards // 2)) * made.calls * rates.node


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
    import os
    import time

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
