"""What is not read or run unless it is asked for: pickled weights, and modelling code that comes with a model."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file

from zotune.cli.app import run
from zotune.errors import InputError
from zotune.models.adapters import put_adapter
from zotune.models.loading import load_model
from zotune.models.schemes import get_scheme


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder: Path, **more: object) -> Path:
    """A model's folder, its weights as pytorch_model.bin."""
    tiny.save_model(folder)
    file = folder / "model.safetensors"
    torch.save(load_file(file) | more, folder / "pytorch_model.bin")
    file.unlink()
    return folder


def test_pickled_weights_are_read_only_if_that_is_allowed(tmp_path):
    folder = pickled(tmp_path / "model")
    with pytest.raises(InputError, match="--allow-pickle reads them"):
        load_model(str(folder))
    found = load_model(str(folder), allow_pickle=True).state_dict()
    for name, tensor in tiny.causal_model().state_dict().items():
        assert torch.equal(found[name], tensor)


def test_code_in_pickled_weights_never_runs(tmp_path):
    folder = pickled(tmp_path / "model", more=Runs(tmp_path / "ran"))
    with pytest.raises(InputError, match="hold more than tensors"):
        load_model(str(folder), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_read_only_if_that_is_allowed(tmp_path):
    get_scheme("lora").prepare(tiny.causal_model()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    with pytest.raises(InputError, match="--allow-pickle reads it"):
        put_adapter(tiny.causal_model(), str(tmp_path))
    put_adapter(tiny.causal_model(), str(tmp_path), allow_pickle=True)


@pytest.mark.parametrize("command", ["eval", "preview", "train"])
def test_an_adapter_is_no_model(command, tmp_path, capsys):
    base, data = tiny.save_model(tmp_path / "base"), tiny.save_data(tmp_path / "data", train=8, test=4)
    adapted = get_scheme("lora").prepare(tf.AutoModelForCausalLM.from_pretrained(base))
    adapted.save_pretrained(tmp_path / "adapter")
    own = ["--data", str(data), "--template", tiny.TEMPLATE, "--label-words", tiny.WORDS]
    own += ["--output", str(tmp_path / "run")] if command == "train" else []
    assert run([command, "--model", str(tmp_path / "adapter"), *own]) == 2
    said = f"this is an adapter; give --model {base} --adapter {tmp_path / 'adapter'}, or make a model of the two"
    assert said in capsys.readouterr().err


def test_a_model_s_own_code_runs_only_if_that_is_allowed(tmp_path, capsys):
    folder = tiny.save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.OwnConfig"}}
    config["auto_map"]["AutoModelForCausalLM"] = "own.Own"
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\nPath({str(marker)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    data = tiny.save_data(tmp_path / "data", train=8, validation=4, test=4)
    given = ["train", *tiny.flags(folder, data, steps=2), "--output", str(tmp_path / "run")]
    assert run(given) == 2
    assert "--trust-remote-code runs that" in capsys.readouterr().err
    assert not marker.exists()
    assert run([*given, "--trust-remote-code"]) == 0
    assert marker.exists()
    assert type(load_model(str(folder), trust_remote_code=True)).__name__ == "Own"


def test_a_gguf_file_is_quantised_anew(tmp_path):
    """Its blocks are read into whole weights first: transformers keeps none packed without kernels from the hub."""
    pytest.importorskip("torchao", reason="zotune[quant] is not installed")
    whole = families.build("llama", vocabulary=tiny.VOCABULARY, wide=True)
    file = gguf_of(whole, tmp_path / "tiny.gguf")
    ids = torch.tensor([[3, 9, 4, 7]])
    with torch.no_grad():
        wanted = load_model(str(tmp_path), gguf_file=file.name)(ids).logits
        torch.testing.assert_close(wanted, whole(ids).logits, rtol=1e-4, atol=1e-4)
        found = load_model(str(tmp_path), gguf_file=file.name, quantize="int8")(ids).logits
    off = (found - wanted).abs().max() / wanted.abs().max()
    assert 0 < off < 0.05


def gguf_of(model, file: Path) -> Path:
    """The model's weights, as llama.cpp lays them out, in float32."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # llama.cpp turns neighbouring pairs, transformers halves
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
