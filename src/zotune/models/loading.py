"""A model and its tokenizer from the hub, a folder or a GGUF file, whole and in one dtype."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.errors import InputError, nearest
from zotune.models.border import damaged, reading
from zotune.models.heads import check_count, head_names, label_names
from zotune.models.hub import look_first
from zotune.models.ids import refuse_uncounted
from zotune.models.kinds import auto_class, head_modules, is_encoder, kind_of_config, refuse_other, without_adapter
from zotune.models.partial import heads_of_others, refuse_partial, some
from zotune.models.quantized import LIBRARIES, is_changed, is_quantized, quantization, steadied
from zotune.streaming import homes, streamed

TOKENIZERS = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "*.py")  # files of which a tokenizer has one at least
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; try --device cpu")
    return torch.device(name)


def load_model(
    name: str,
    *,
    kind: str = "causal",
    labels: Sequence[str] = (),
    seed: int = 0,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    gguf_file: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> nn.Module:
    """The pretrained model, in eval mode, on the device.

    name: a hub name or a local folder. kind: see `zotune.models.kinds`. labels: of a classifier, the names of its outputs in their
    order, whatever the checkpoint calls them (`zotune.models.heads` matches those by name); the head that a checkpoint lacks is
    drawn by the seed (`fresh_parameters` names what was). dtype None keeps the checkpoint's own (float32 for GGUF). quantize: see
    `zotune.models.quantized`; a head stays whole. Weights are read from safetensors or GGUF; pickled ones, by torch's reader of
    tensors alone, if that is allowed. Raises InputError where the model cannot be had.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    packed: dict[str, Any] = {}
    if quantize is not None:
        packed = {"quantization_config": quantization(quantize), "device_map": {"": torch.device(device)}}
    if gguf_file is not None:
        if kind != "causal":
            raise InputError(f"--gguf-file {gguf_file}: only causal models are read from GGUF, this is a {kind} one")
        with _said_as_one_line(name, gguf_file):
            model = _from_gguf(name, gguf_file, kwargs)
            model = model.to(DTYPES[dtype]) if dtype else model
            if quantize is None:
                return model.to(device).eval()
            packed |= {"config": model.config, "state_dict": model.state_dict(), "dtype": model.dtype}
            made: Any = type(model)
            quantized = made.from_pretrained(None, **packed)
            quantized.generation_config = model.generation_config
        return _quantized(quantized, name, quantize)
    kwargs |= {"dtype": DTYPES[dtype] if dtype else "auto", "use_safetensors": None if allow_pickle else True} | packed
    os.environ.setdefault(
        "DISABLE_SAFETENSORS_CONVERSION", "1"
    )  # transformers would have a server convert pickled ones
    if kind == "classifier" and labels:
        if held := head_names(load_config(name, trust_remote_code=trust_remote_code)):
            check_count(held, labels, f"--model {name}", "its adapter or run")
        kwargs |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        kwargs |= {"label2id": {label: i for i, label in enumerate(labels)}}
    with _said_as_one_line(name, None), _pickled_refused(name, allow_pickle):
        if quantize is not None and kind == "classifier":  # its head trains
            with torch.device("meta"):
                config = load_config(name, trust_remote_code=trust_remote_code)
                whole = head_modules(auto_class(kind).from_config(config, trust_remote_code=trust_remote_code))
            kwargs["quantization_config"] = quantization(quantize, whole)
        model, missing, unexpected = _pretrained(kind, name, seed, kwargs)
        if quantize is not None and missing and kind == "classifier":  # so do other modules that the checkpoint lacks
            whole += sorted({key.rpartition(".")[0] for key in missing})
            kwargs["quantization_config"] = quantization(quantize, whole)
            model, missing, unexpected = _pretrained(kind, name, seed, kwargs)
    refuse_partial(model, name, missing, unexpected)
    refuse_uncounted(model, f"--model {name}")
    if kind == "classifier":
        missing |= heads_of_others(model)
    elif missing:
        raise InputError(
            f"--model {name}: the checkpoint has no weights for {some(missing)}, which a {kind} language model needs; "
            "give --model-kind classifier for a fresh head over label words"
        )
    if kind == "causal" and is_encoder(model.config) and _looks_ahead(model):
        raise InputError(
            f"--model {name}: an encoder, whose tokens see what comes after them, so that it predicts no next one; give "
            "--model-kind masked or classifier"
        )
    model.fresh_parameters = missing  # type: ignore[assignment]  # no module and no tensor
    if (
        found := damaged(Path(name).expanduser() / "generation_config.json")
    ) is not None:  # transformers goes on without
        raise InputError(f"--model {name}: {found}")
    if not is_quantized(model):
        return model.to(device).eval()
    if model.device.type != torch.device(device).type:  # 8-bit weights of some libraries cannot be moved
        model = model.to(device)
    return _quantized(model, name, quantize)


def find_kind(
    name: str,
    asked: str = "auto",
    *,
    adapter: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[str, list[str]]:
    """The kind that is asked for, or the adapter's, or the checkpoint's; and what an adapter's classifier calls its outputs."""
    _refuse_adapter(name)
    if adapter and (Path(adapter).expanduser() / "config.json").is_file():
        config = load_config(str(Path(adapter).expanduser()))
        kind = kind_of_config(config) if asked == "auto" else asked
        return kind, label_names(config) if kind == "classifier" else []
    if asked == "auto":
        asked = "causal" if gguf_file else kind_of_config(load_config(name, trust_remote_code=trust_remote_code))
    return asked, []


def check_architecture(name: str, kind: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> None:
    """Raises InputError where the checkpoint's architecture is none that a model of the kind is made of."""
    if not gguf_file:
        refuse_other(load_config(name, trust_remote_code=trust_remote_code), kind, name)


def _refuse_adapter(name: str) -> None:
    """transformers would look for its base, and train that."""
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file() or any(folder.glob("model*.safetensors")):
        return
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    raise InputError(
        f"--model {name}: this is an adapter; give --model {base or 'BASE'} --adapter {name}, or make a model of the two by "
        "`zotune merge`"
    )


def load_config(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    import transformers

    with _said_as_one_line(name, gguf_file):
        extra = {"gguf_file": gguf_file} if gguf_file else {}
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)


def limit_of(name: str, kind: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> int | None:
    """`length_limit` of a model whose weights are not read."""
    config = load_config(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return length_limit(auto_class(kind).from_config(config, trust_remote_code=trust_remote_code))
    except Exception:  # whatever a model's own code may do that cannot be done without values
        return _positions(config)


def load_tokenizer(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    import transformers

    with _said_as_one_line(name, gguf_file, "its tokenizer cannot be read: "):
        extra = {"gguf_file": gguf_file} if gguf_file else {}
        if (
            gguf_file is None
            and (path := Path(name).expanduser()).is_dir()
            and not any(any(path.glob(like)) for like in TOKENIZERS)
        ):
            raise InputError(f"--model {name}: no tokenizer in it, such as tokenizer.json; put there that of its model")
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **extra)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> bool:
    """Copy a saved model's tensors into the model's own, one at a time. False where the folder holds no whole model.

    Raises InputError where its tensors are not the model's: then nothing was copied.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return False
    own: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    own |= homes(model)
    with reading(str(folder), folder):
        held = {name: file for file in files for name in _names_in(file)}
    saved_once = {id(own[name]) for name in held if name in own}  # of tied ones one is saved
    lacks = [name for name in model.state_dict() if id(own[name]) not in saved_once]
    more = [name for name in held if name not in own]
    if lacks or more:
        raise InputError(
            f"{folder}: not a checkpoint of this model: "
            + "; ".join([f"no weights for {some(lacks)}"] * bool(lacks) + [f"no place for {some(more)}"] * bool(more))
        )
    with reading(str(folder), folder):
        for file in files:
            with safe_open(file, framework="pt") as saved:
                for name in saved.keys():  # noqa: SIM118  # not a dict
                    own[name].copy_(saved.get_tensor(name))
    if (weights := streamed(list(model.parameters()))) is not None:
        weights.refresh()
    return True


def _names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as saved:
        return list(saved.keys())


def length_limit(model: nn.Module) -> int | None:
    """How many tokens the model takes, from its config, less an adapter's virtual ones; None where the config does not say."""
    adapter: Any = getattr(model, "active_peft_config", None)
    virtual = adapter.num_virtual_tokens if adapter is not None and adapter.is_prompt_learning else 0
    limit = _positions(model.config)
    return None if limit is None else limit - _positions_unused(model) - virtual


def _positions(config: Any) -> int | None:
    config = getattr(config, "text_config", config)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _positions_unused(model: nn.Module) -> int:
    """Where a table of positions has a row for padding, positions count from the row behind it."""
    for name, module in without_adapter(model).named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


@torch.inference_mode()
def _looks_ahead(model: nn.Module) -> bool:
    """Whether another last token changes the logits of those before it."""
    texts = (torch.tensor([[5, 6, 7, last]], device=next(model.parameters()).device) for last in (5, 6))
    one, other = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in texts)
    return not torch.equal(one, other)


def _pretrained(kind: str, name: str, seed: int, kwargs: dict[str, Any]) -> tuple[nn.Module, set[str], set[str]]:
    """The model, the parameters that its checkpoint lacks, drawn by the seed, and what of it fits nowhere."""
    import transformers

    transformers.set_seed(seed)
    model, info = auto_class(kind).from_pretrained(name, output_loading_info=True, **kwargs)
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def _quantized(model: nn.Module, name: str, quantize: str | None) -> nn.Module:
    if quantize is not None and not is_changed(model):
        other = next(key for key in LIBRARIES if key != quantize)
        raise InputError(
            f"--quantize {quantize}: {LIBRARIES[quantize]} quantises no weight of {name}, whose linear maps are of another "
            f"kind; try --quantize {other}"
        )
    return steadied(model, own_dtype=quantize is not None).eval()


def _from_gguf(name: str, gguf_file: str, kwargs: dict[str, Any]) -> nn.Module:
    """transformers takes a model from a GGUF file for a quantised one and refuses to cast it: build it once more."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    told = {"gguf_file": gguf_file, "dtype": torch.float32, "output_loading_info": True}
    read, info = auto.from_pretrained(name, **told, **kwargs)
    config = read.config
    if lacks := set(info["missing_keys"]):
        raise InputError(f"--gguf-file {gguf_file}: loads in part: it has no weights for {some(lacks)}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


@contextlib.contextmanager
def _pickled_refused(name: str, allowed: bool) -> Iterator[None]:
    """What transformers says of a checkpoint without safetensors, with what there is to do."""
    try:
        yield
    except OSError as error:
        folder = Path(name).expanduser()
        only_pickled = bool(list(folder.glob("pytorch_model*.bin"))) or "safetensors`" in str(error)
        if allowed or not only_pickled:
            raise
        raise InputError(
            f"--model {name}: no safetensors in it, and pickled weights can hold code; --allow-pickle reads them (tensors "
            "alone, by torch's weights_only)"
        ) from None


@contextlib.contextmanager
def _said_as_one_line(name: str, gguf_file: str | None, said: str = "") -> Iterator[None]:
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise InputError(f"--model {name}: no such folder" + (f"; {nearest(path.name, near)}" if near else ""))
    if gguf_file and path.is_dir() and not (path / gguf_file).is_file():
        here = sorted(p.name for p in path.glob("*.gguf"))
        raise InputError(f"--gguf-file {gguf_file}: not in {name} (it has {', '.join(here) or 'no .gguf file'})")
    where = path / gguf_file if gguf_file and path.is_dir() else name
    look_first(name)
    with reading(f"--model {name}", where, said):
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:
            if (line := _told(str(error))) is None:
                raise
            raise InputError(f"--model {name}: {line}") from error


def _told(words: str) -> str | None:
    """What to do where transformers' words name an argument that nobody here can give."""
    if "couldn't connect to" in words:
        return (
            "no folder of that name, not among this machine's files of the hub, and the hub cannot be reached; give a folder, or "
            "fetch it first where there is a network (hf download NAME)"
        )
    if "trust_remote_code" in words:
        return "it comes with modelling code of its own; --trust-remote-code runs that, so read it first"
    if "ignore_mismatched_sizes" in words:
        return (
            "its weights have other shapes than its config.json, or a head of the task's labels, asks for; "
            "fetch it again, or start from a model without a head"
        )
    return None
