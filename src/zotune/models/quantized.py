"""8- and 4-bit bases: their weights stay as they are, an adapter trains on top."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import InputError
from zotune.models.kinds import without_adapter

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantization(name: str, whole: Sequence[str] = ()) -> Any:
    """What transformers is told, so that it quantises while it loads.

    int8: torchao's, of weights alone, a scale a row. bitsandbytes' int8 would round activations too, and pick columns to leave
    whole by the batch: losses would be steps in ε, and depend on a batch's other rows.
    nf4: bitsandbytes' 4-bit floats in blocks of 64.
    whole: modules that stay as they are, instead of the output head.
    Raises InputError where the library is missing.
    """
    import transformers

    library = LIBRARIES[name]
    if find_spec(library) is None:
        raise InputError(f"--quantize {name}: needs {library}; pip install 'zotune[quant]'")
    if name == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list(whole) or None
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(whole) or None)


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights of the model, or of the base under an adapter, are quantised: here, or in its checkpoint."""
    return bool(getattr(without_adapter(model), "is_quantized", False))


def steadied(model: nn.Module, own_dtype: bool) -> nn.Module:
    """Products of 4-bit weights in a dtype that two close losses can be told apart in.

    On CPUs that have bfloat16 bitsandbytes packs the weights anew at the first forward and multiplies in it, whatever was
    asked for. own_dtype: compute in the model's dtype, not in the quantisation's own. Raises InputError where its CPU kernel
    takes wrong scales: blocks go on from row to row, and it begins one with each row.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise InputError(
                f"4-bit weights on the CPU: {name} is {state.shape[-1]} wide, and bitsandbytes reads there only multiples of "
                f"its blocks of {state.blocksize}; use --quantize int8, or CUDA"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if own_dtype and hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = model.dtype, True
    return model


def is_changed(model: nn.Module) -> bool:
    """Whether any weight is quantised: a library may find none that it knows (GPT-2's are no `nn.Linear`)."""
    return any(
        not p.is_floating_point() or len(inner_tensors(p)) > 1 or inner_tensors(p)[0].dtype != p.dtype
        for p in model.parameters()
    )


def refuse_whole(model: nn.Module, scheme: str) -> None:
    """Raises InputError: the scheme trains weights of the model, and these are quantised."""
    if is_quantized(model):
        raise InputError(
            f"--scheme {scheme}: the model's weights are quantised and cannot be trained; use --scheme lora, prefix or prompt"
        )


def refuse_rough(model: nn.Module, name: str) -> None:
    """Raises InputError where activations are rounded too: two losses at θ ± εz then differ by that, not by z (docs/log.md)."""
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        raise InputError(
            f"--model {name}: its checkpoint is in bitsandbytes' 8 bits, which round activations by more than a probe moves the "
            "loss; take the whole model with --quantize int8, or a method that back-propagates (fo-adam, fo-sgd)"
        )


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's values: itself, or those that a quantised one is made of."""
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if not hasattr(data, "__tensor_flatten__"):
        return [data]
    names, _ = data.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(data, name))]


def weight_bytes(model: nn.Module) -> int:
    """What the parameters take, in memory; of 4-bit ones without their scales, a byte in 16."""
    return sum(t.numel() * t.element_size() for p in model.parameters() for t in inner_tensors(p))


def library_versions(model: nn.Module) -> dict[str, str]:
    """Of the library that quantised the model: its bits may depend on it."""
    method = getattr(getattr(without_adapter(model).config, "quantization_config", None), "quant_method", None)
    name = str(getattr(method, "value", method))
    return {name: metadata.version(name)} if is_quantized(model) and find_spec(name) is not None else {}


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the largest parameter that is no integer: an adapter may have its own."""
    return max((p for p in model.parameters() if p.is_floating_point()), key=lambda p: p.numel()).dtype
