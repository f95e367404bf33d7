"""`zotune merge`."""

from __future__ import annotations

import shutil
from pathlib import Path

from zotune.config import MergeConfig
from zotune.errors import InputError
from zotune.models.adapters import put_adapter, save
from zotune.run import load


def merge(options: MergeConfig) -> None:
    """The model with the adapter's products added to its weights, as a plain model."""
    output = Path(options.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not options.overwrite:
        raise InputError(f"--output {output}: not empty; name another folder, or pass --overwrite")
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
    merged = adapted.merge_and_unload()
    if output.exists():
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    save(merged, tokenizer, output)
    print(f"merged model: {output}")
