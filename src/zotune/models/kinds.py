"""Which of three kinds a model is, by its checkpoint's architecture: causal, masked or classifier."""

from __future__ import annotations

from typing import Any

from torch import nn

from zotune.errors import InputError

KINDS = ("causal", "masked", "classifier")
_ENDINGS = {"ForCausalLM": "causal", "ForMaskedLM": "masked", "ForSequenceClassification": "classifier"}


def auto_class(kind: str) -> Any:
    """The class of transformers that loads models of the kind."""
    import transformers

    return {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[kind]


def kind_of_config(config: Any) -> str:
    """What a checkpoint holds: what its architecture says; else, for an encoder without a head, a classifier.

    An encoder is what transformers knows a masked language model of. One that names no architecture, or one with several heads
    (BERT's pretraining), is taken for a masked language model; loading finds out whether its head is there.
    """
    from transformers.models.auto import modeling_auto as auto

    named = (getattr(config, "architectures", None) or [""])[0]
    if found := _kind_of_class(named):
        return found
    if not is_encoder(config):
        return "causal"
    return "classifier" if named in auto.MODEL_MAPPING_NAMES.values() else "masked"


def refuse_other(config: Any, kind: str, name: str) -> None:
    """Raises InputError where no model of the kind can be made of a checkpoint: which option serves instead, or that none does."""
    named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if fits(config, kind):
        return
    wanted = "sequence classifier" if kind == "classifier" else f"{kind} language model"
    others = [other for other in KINDS if other != kind and fits(config, other)]
    reads = {
        "causal": "reads it as one",
        "masked": "reads it as one whose answers stand at masks",
        "classifier": "trains a head over label words on it",
    }
    serves = " or ".join(f"--model-kind {other} {reads[other]}" for other in others)
    none = "no option makes one of it: name a causal or masked language model, or a sequence classifier of texts"
    raise InputError(f"--model {name}: a {named} is no {wanted}; {serves or none}")


def fits(config: Any, kind: str) -> bool:
    """Whether transformers, or the checkpoint's own code, has a class of the kind; a decoder alone is not an encoder-decoder."""
    auto, named = auto_class(kind), (getattr(config, "architectures", None) or [""])[0]
    if auto.__name__ in (getattr(config, "auto_map", None) or {}):
        return True
    if kind == "causal" and getattr(config, "is_encoder_decoder", False) and _kind_of_class(named) != "causal":
        return False
    return type(config) in auto._model_mapping


def names_classifier(config: Any) -> bool:
    """Whether a checkpoint's architecture has a classifier's head; unlike `kind_of_config` never of a bare encoder."""
    return _kind_of_class((getattr(config, "architectures", None) or [""])[0]) == "classifier"


def is_encoder(config: Any) -> bool:
    from transformers.models.auto import modeling_auto as auto

    return config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def kind_of(model: nn.Module) -> str:
    """The kind of a loaded model, with or without an adapter on it."""
    return _kind_of_class(type(without_adapter(model)).__name__) or "causal"


def without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that are a classifier's head: what stands beside the backbone, and what the checkpoint lacked."""
    backbone = str(getattr(model, "base_model_prefix", ""))
    beside = [
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    ]
    fresh: set[str] = getattr(model, "fresh_parameters", set())
    inside = [
        name
        for name, module in model.named_modules()
        if name and fresh and (own := [f"{name}.{p}" for p, _ in module.named_parameters()]) and fresh.issuperset(own)
    ]
    names = beside + [name for name in inside if name.startswith(f"{backbone}.")]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _kind_of_class(name: str) -> str | None:
    from transformers.models.auto import modeling_auto as auto

    for names, kind in (
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "classifier"),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal"),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked"),
    ):
        if name in names.values():
            return kind
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
