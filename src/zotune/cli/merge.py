"""`zotune merge`."""

from __future__ import annotations

from pathlib import Path

from zotune.errors import InputError
from zotune.models.adapters import put_adapter, save
from zotune.options import MergeConfig
from zotune.run.folder import check_model_folder, model_folder
from zotune.run.train import load
from zotune.tasks import ends


def merge(options: MergeConfig) -> None:
    """The model with the adapter's products added to its weights, as a plain model."""
    output = Path(options.output).expanduser()
    check_model_folder(output, options.overwrite)
    if options.quantize is not None:
        raise InputError(
            f"--quantize {options.quantize}: an adapter is merged into whole weights; leave the option out"
        )
    model, tokenizer = load(options)
    adapted = put_adapter(model, options.adapter, options.allow_pickle)
    if adapted.active_peft_config.is_prompt_learning:
        raise InputError(
            f"--adapter {options.adapter}: virtual tokens cannot be merged into weights; use the adapter as it is (--adapter)"
        )
    ends.take_from_adapter(adapted, options.adapter)
    merged = adapted.merge_and_unload()
    with model_folder(output) as path:
        save(merged, tokenizer, path)
    print(f"merged model: {output}")
