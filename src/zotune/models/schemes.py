"""Which parameters train: all of them, or an adapter's."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zotune.errors import InputError, nearest
from zotune.models.border import reading
from zotune.models.ids import refuse_without_ids
from zotune.models.kinds import head_modules, kind_of
from zotune.models.quantized import refuse_whole

SMALL_MODEL = 500_000_000  # parameters; smaller ones want larger steps


@dataclass(frozen=True)
class Scheme:
    """What a scheme trains, how it prepares a model, and where to start with lr and eps (MeZO's ranges)."""

    trains: str
    prepare: Callable[[nn.Module], nn.Module]
    lr: float
    small_lr: float
    eps: float
    tokens: int = 0  # of the model's length that it takes

    def default_lr(self, model: nn.Module) -> float:
        return self.small_lr if sum(p.numel() for p in model.parameters()) < SMALL_MODEL else self.lr


def _full(model: nn.Module) -> nn.Module:
    refuse_whole(model, "full")
    return model.requires_grad_(True)


def _lora(model: nn.Module) -> nn.Module:
    """r 8, α 16, no dropout, B = 0, on q_proj and v_proj.

    Elsewhere on the modules that PEFT names for the family; where it knows none, on what makes queries, keys and values at once,
    or else on all linear maps but the head.
    """
    import peft
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets: Any = ["q_proj", "v_proj"] if {"q_proj", "v_proj"} <= names else None
    if targets is None and getattr(model.config, "model_type", None) not in KNOWN:
        targets = sorted(name for name in names if "qkv" in name.lower()) or "all-linear"
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, **_of_kind(model))
    return _adapted(model, config, "lora")


PREFIX_TOKENS, PROMPT_TOKENS = 5, 10


@torch.no_grad()
def _prefix(model: nn.Module) -> nn.Module:
    """5 tokens' keys and values in each layer, no reparametrisation, started from those of 5 random real tokens."""
    import peft

    config = peft.PrefixTuningConfig(num_virtual_tokens=PREFIX_TOKENS, prefix_projection=False, **_of_kind(model))
    cache = _cache_of(model, _random_tokens(model, PREFIX_TOKENS))
    adapted = _adapted(model, config, "prefix")
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (2, heads, tokens, width)
    if (seen := min(layer.shape[2] for layer in layers)) < PREFIX_TOKENS:
        raise InputError(
            f"--scheme prefix: a layer of the model looks back on {seen} tokens, fewer than a prefix of {PREFIX_TOKENS}; "
            "use --scheme lora or prompt"
        )
    start = torch.cat(layers).permute(2, 0, 1, 3).flatten(1)
    weight = adapted.prompt_encoder["default"].embedding.weight
    if weight.shape != start.shape:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise InputError(
            f"--scheme prefix: PEFT makes a prefix of {tuple(weight.shape)} for {kind!r}, its keys and values are "
            f"{tuple(start.shape)}; use --scheme lora or prompt"
        )
    weight.copy_(start)
    adapted.base_model.register_forward_pre_hook(_keep_no_more, with_kwargs=True)
    return adapted


@torch.no_grad()
def _prompt(model: nn.Module) -> nn.Module:
    """10 virtual tokens before the input's embeddings, started from the embeddings of random real tokens."""
    import peft

    refuse_without_ids(model, "--scheme prompt", "--scheme prefix or lora")
    tokens = _random_tokens(model, PROMPT_TOKENS)
    start = model.get_input_embeddings()(tokens)[0]  # type: ignore[operator]
    adapted = _adapted(model, peft.PromptTuningConfig(num_virtual_tokens=PROMPT_TOKENS, **_of_kind(model)), "prompt")
    adapted.prompt_encoder["default"].embedding.weight.copy_(start)
    return adapted


def _head(model: nn.Module) -> nn.Module:
    """The output head alone, untied from the embedding; of a classifier its head."""
    refuse_whole(model, "head")
    model.requires_grad_(False)
    if kind_of(model) == "classifier":
        for name in head_modules(model):
            model.get_submodule(name).requires_grad_(True)
        return model
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise InputError("--scheme head: the model has no output head")
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        for name, param in list(head.named_parameters(recurse=False)):  # masked models tie the bias too
            setattr(head, name, nn.Parameter(param.detach().clone()))
        configs: list[Any] = [model.config, getattr(model.config, "text_config", None)]
        for config in filter(None, configs):
            config.tie_word_embeddings = False
    head.requires_grad_(True)
    return model


def _of_kind(model: nn.Module) -> dict[str, Any]:
    """What PEFT wants to know: how the model is called, and a classifier's head, which trains with the adapter."""
    kind = kind_of(model)
    if kind == "classifier":
        return {"task_type": "SEQ_CLS", "modules_to_save": head_modules(model)}
    return {
        "task_type": "CAUSAL_LM" if kind == "causal" else "FEATURE_EXTRACTION"
    }  # the latter adds nothing of its own


def _random_tokens(model: nn.Module, count: int) -> torch.Tensor:
    """(1, count) ids, from torch's generator."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(0, embeddings.weight.shape[0], (1, count))
    return ids.to(embeddings.weight.device)


def _cache_of(model: nn.Module, ids: torch.Tensor) -> Any:
    """The keys and values of these tokens, a layer each. An encoder keeps none unless it is given a cache to fill."""
    import transformers

    if kind_of(model) == "causal":
        cache = model(input_ids=ids, use_cache=True).past_key_values
    else:
        cache = transformers.DynamicCache()
        with contextlib.suppress(TypeError):  # a forward that takes no cache
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    if not getattr(cache, "layers", None):
        raise InputError(
            f"--scheme prefix: {model.config.model_type!r} takes no keys and values from outside; "  # type: ignore[union-attr]
            "use --scheme lora or prompt"
        )
    return cache


def _adapted(model: nn.Module, config: Any, scheme: str) -> Any:
    import peft

    kind = getattr(model.config, "model_type", type(model).__name__)
    with reading(f"--scheme {scheme}: PEFT cannot adapt {kind!r}"):
        adapted = peft.get_peft_model(model, config)
    if config.is_prompt_learning:
        adapted.register_forward_pre_hook(_on_its_device)
        adapted.base_model.register_forward_pre_hook(_off_its_device)
        adapted.register_forward_hook(_as_it_was, always_call=True)
    return adapted


def _keep_no_more(base: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A prefix comes as a cache of keys and values, which would keep those of all layers and tokens until the forward ends.
    Where nobody wants a cache back, each layer's go when it has read them."""
    from transformers.cache_utils import DynamicLayer

    if kwargs.get("use_cache") is not False:
        return
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        if type(layer) is DynamicLayer and layer.is_initialized:  # sliding ones keep a window
            layer.__class__ = _passing()


@functools.cache
def _passing() -> type:
    from transformers.cache_utils import DynamicLayer

    class PassingLayer(DynamicLayer):
        """A prefix's keys and values, which go before those of an input and take none of them in."""

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            assert self.keys is not None
            assert self.values is not None
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    return PassingLayer


def _on_its_device(adapted: Any, args: Any) -> None:
    """What PEFT makes in each forward, ids of virtual tokens and their mask, is made where the weights are: a copy from the
    host would wait for the device, and no CUDA graph can hold one. PEFT's ids count from 0."""
    device = adapted.prompt_encoder[adapted.active_adapter].embedding.weight.device
    if device.type == "cpu" or torch.compiler.is_compiling():
        return
    adapted.host_tokens = adapted.prompt_tokens
    adapted.prompt_tokens = {name: torch.arange(len(ids), device=device) for name, ids in adapted.host_tokens.items()}
    adapted.base_model.until_here = made = contextlib.ExitStack()
    made.enter_context(device)


def _off_its_device(base: Any, args: Any) -> None:
    """The model's own forward is as it would be without."""
    if (made := getattr(base, "until_here", None)) is not None:
        made.close()


def _as_it_was(adapted: Any, args: Any, out: Any) -> None:
    """After a forward that failed too."""
    _off_its_device(adapted.base_model, args)
    if hasattr(adapted, "host_tokens"):
        adapted.prompt_tokens = adapted.host_tokens
        del adapted.host_tokens, adapted.base_model.until_here


SCHEMES = {
    "full": Scheme("all parameters", _full, lr=1e-6, small_lr=1e-5, eps=1e-3),
    "lora": Scheme("LoRA r 8, α 16 on q_proj and v_proj", _lora, lr=1e-4, small_lr=3e-4, eps=1e-2),
    "prefix": Scheme("keys and values of 5 tokens before each layer's", _prefix, 1e-3, 1e-2, 1e-1, PREFIX_TOKENS),
    "prompt": Scheme("embeddings of 10 tokens before the input's", _prompt, 1e-3, 1e-3, 1e-2, PROMPT_TOKENS),
    "head": Scheme("the output head, untied from the embedding", _head, lr=1e-5, small_lr=1e-4, eps=1e-3),
}


def prepare(model: nn.Module, scheme: str, freeze: Sequence[str] = ()) -> nn.Module:
    """The model with a scheme on, less the parameters whose names match a pattern (as of file names) of `freeze`.

    Raises InputError for a pattern that matches nothing trainable, and where nothing is left to train.
    """
    model = get_scheme(scheme).prepare(model)
    for pattern in freeze:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matched = [p for name, p in named if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(f"--freeze {pattern!r}: matches no trainable parameter, such as {named[0][0]!r}")
        if len(matched) == len(named):
            raise InputError(f"--freeze {pattern!r}: nothing is left to train")
        for param in matched:
            param.requires_grad_(False)
    return model


def get_scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name!r}; {nearest(name, SCHEMES)}")
    return SCHEMES[name]


def trainable_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
