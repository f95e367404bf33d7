"""Ids that tokenizer and config both name: one of each, which the model's tables have."""

from __future__ import annotations

from typing import Any

from torch import nn

from zotune.errors import InputError
from zotune.models.kinds import is_encoder, kind_of, without_adapter


def embedding_rows(model: nn.Module) -> int | None:
    """How many ids the model takes."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    weight = getattr(table, "weight", None)
    rows = getattr(table, "num_embeddings", None) or (None if weight is None else weight.shape[0])
    return None if rows is None else int(rows)


def pad_id(tokenizer: Any, model: nn.Module) -> int:
    """What batches are padded with. Any id that the embedding has serves, since nothing that a loss reads comes after padding, but
    for a classifier that finds the last token by it, whose config then names the same one; see `agree`."""
    rows, config = embedding_rows(model), model.config
    named = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    return next((i for i in named if isinstance(i, int) and i >= 0 and (rows is None or i < rows)), 0)


def padding_counts(model: nn.Module) -> bool:
    """Whether padding on the left changes what a model writes: it stands between an adapter's virtual tokens and the text.

    Virtual tokens that are embeddings are then further away from the text than they were trained; keys and values (prefix) are
    not, but where a layer's window slides over them.
    """
    adapter: Any = getattr(model, "active_peft_config", None)
    if adapter is None or not adapter.is_prompt_learning:
        return False
    config: Any = without_adapter(model).config
    sliding = "sliding_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())
    return str(getattr(adapter.peft_type, "value", adapter.peft_type)) != "PREFIX_TUNING" or sliding


def refuse_without_ids(model: nn.Module, where: str, instead: str) -> None:
    """Raises InputError for a decoder's classifier behind virtual tokens: it would read the text's last token, which it finds by
    ids, and embeddings have none, so that it reads padding. where, instead: who asks for them, and what serves.
    """
    config: Any = without_adapter(model).config
    decodes = getattr(config, "is_encoder_decoder", False) or not is_encoder(config)
    if kind_of(model) == "classifier" and decodes:
        raise InputError(f"{where}: a decoder's classifier cannot tell padding from text there; use {instead}")


def refuse_uncounted(model: nn.Module, where: str) -> None:
    """Raises InputError where a model counts positions from its padding's id (RoBERTa and its kin) and its config names none.

    The tokenizer's would be a guess: positions begin behind the id that the model was trained with. where: whose config it is.
    """
    for module in model.modules():
        table: Any = getattr(module, "position_embeddings", None)
        if not isinstance(table, nn.Embedding) or not hasattr(module, "padding_idx"):
            continue
        if not (isinstance(module.padding_idx, int) and 0 <= module.padding_idx < table.num_embeddings):
            raise InputError(
                f"{where}: pad_token_id of its config.json is {module.padding_idx}, and the model counts positions from it; write "
                "there the one that it was trained with (RoBERTa's is 1)"
            )


def agree(model: nn.Module, tokenizer: Any, where: str) -> None:
    """The ids by which a classifier finds the token that it reads are those that its batches have.

    A decoder reads the last token that is no padding, an encoder-decoder the end of the text. Config and tokenizer may name
    different ones. where: whose they are, for an error.
    """
    if kind_of(model) != "classifier":
        return
    config: Any = model.config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    text.pad_token_id = config.pad_token_id = pad_id(tokenizer, model)
    if getattr(config, "is_encoder_decoder", False):
        end = tokenizer.eos_token_id
        if end is None or list(tokenizer("a")["input_ids"])[-1] != end:
            raise InputError(
                f"{where}: its head reads the token at the text's end, and its tokenizer writes none; name a model whose tokenizer "
                "does"
            )
        config.eos_token_id = end
        if config.pad_token_id == end:
            raise InputError(
                f"{where}: its head finds the text's end by token {end}, which its tokenizer pads with too; name a model whose "
                "tokenizer has a padding token of its own"
            )


def refuse_beyond(ids: list[int], rows: int | None, tokenizer: Any, where: str) -> None:
    """Raises InputError for a token that the model's embedding has no row for."""
    if rows is not None and ids and (most := max(ids)) >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise InputError(
            f"{where}: token {token!r} has id {most}, and the model's embedding {rows} rows: the tokenizer is another model's, or "
            "got tokens that the model did not; use the model's own, or give the model rows for them "
            "(transformers' resize_token_embeddings)"
        )
