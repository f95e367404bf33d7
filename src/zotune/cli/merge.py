"""`zotune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zotune.errors import InputError
from zotune.models.adapters import put_adapter, refuse_other_tokens, save, unproven
from zotune.models.kinds import kind_of
from zotune.models.loading import load_model
from zotune.models.merging import merged, seen
from zotune.models.partial import refuse_untrained
from zotune.options import MergeConfig
from zotune.prepare.model import load
from zotune.run.folder import check_model_folder, model_folder
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
    refuse_untrained(adapted, f"--model {options.model}")
    refuse_other_tokens(options.adapter, tokenizer)
    ends.take_from_adapter(adapted, options.adapter)
    if said := unproven(options.adapter, options.model):
        print(said)
    before, kind = seen(adapted), kind_of(adapted)
    device = before.ids.device
    whole = merged(adapted, f"--adapter {options.adapter}")
    with model_folder(output) as path:
        save(whole, tokenizer, path)
        del model, adapted, whole  # one of them at a time
        read: dict[str, Any] = {"kind": kind, "device": device, "trust_remote_code": options.trust_remote_code}
        said = before.check(load_model(str(path), **read), f"--adapter {options.adapter}")
    if said:
        print(said)
    print(f"merged model: {output}")
