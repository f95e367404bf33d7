"""Layers that stay in their checkpoint's files, and layers of 4 bits: what they compute is what weights in memory do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from test_streaming import DEVICES, batch, small, taken

from zotune.engines.streamed import plan_of
from zotune.errors import InputError, StorageError
from zotune.models.schemes import get_scheme
from zotune.step.rates import scale_of
from zotune.streaming import StreamedWeights, stream
from zotune.streaming.files import Place, places
from zotune.tasks.scoring import candidate_losses

LORA = {"method": "leave-one-out", "groups": "batch", "queries": 3, "engine": "lowrank"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> torch.nn.Module:
    return tf.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    model.requires_grad_(False)
    torch.manual_seed(3)
    return get_scheme("lora").prepare(model)


def over_files(model: torch.nn.Module, blocks: int, device: str = "cpu") -> StreamedWeights:
    """So many of its blocks in memory."""
    plan = plan_of(model)
    return stream(model, plan, device, 3, None, (blocks + 2) * plan.room + 1 if blocks else 1)


def test_the_kernel_says_where_a_tensor_lies(saved):
    model = loaded(saved)
    for name, tensor in list(model.state_dict().items())[:8]:
        (found,) = places([tensor])
        assert found is not None, name
        with open(found.path, "rb") as file:
            file.seek(found.offset)
            assert file.read(found.size) == tensor.numpy().tobytes()
    assert places([torch.zeros(1 << 16)]) == [None]


def test_what_was_written_into_is_no_longer_the_files(saved):
    model = loaded(saved)
    weight = model.model.decoder.layers[1].fc1.weight
    assert places([weight.data])[0] is not None
    with torch.no_grad():
        weight[0, 0] += 1
    assert places([weight.data]) == [None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_steps_over_files_are_those_over_memory(saved, blocks, device):
    stay, go = adapted(loaded(saved)).to(device), adapted(loaded(saved))
    weights = over_files(go, blocks, device)
    assert [block.places is not None for block in weights.blocks].count(True) == 5 - blocks
    (_, ours), (_, theirs) = taken(go, LORA, device=device), taken(stay, LORA, device=device)
    assert ours == theirs
    assert weights.moved_in > weights.host_bytes
    rows = {k: v.to(device) for k, v in batch().items()}
    with torch.no_grad():
        assert torch.equal(candidate_losses(go, rows), candidate_losses(stay, rows))
    weights.end()
    after = loaded(saved).state_dict()
    assert all(
        torch.equal(value.cpu(), after[name]) for name, value in go.unload().state_dict().items() if name in after
    )


def test_files_are_spread_among_the_others(saved):
    weights = over_files(adapted(loaded(saved)), 2)
    assert [block.places is not None for block in weights.blocks] == [False, True, False, True, True]


def test_what_trains_does_not_stay_in_files(saved):
    model = loaded(saved)
    over_files(model, 0)
    with pytest.raises(InputError, match=r"these train; use --scheme lora, prefix or prompt"):
        taken(model, {"method": "zo-sgd", "engine": "lowrank"}, 1)


def test_what_no_file_has_cannot_stay_there(saved):
    with pytest.raises(InputError, match=r"--max-host-memory: weights of .*layers\.0 are not as a file has them"):
        over_files(adapted(loaded(saved).to(torch.bfloat16)), 0)


def test_other_weights_are_refused(saved):
    model = adapted(loaded(saved))
    over_files(model, 0)
    with pytest.raises(InputError, match="cannot be replaced"):
        model.load_state_dict(model.state_dict())


def test_a_file_that_became_shorter_stops_the_step(saved, tmp_path):
    import shutil

    folder = Path(shutil.copytree(saved, tmp_path / "short"))
    model = adapted(loaded(folder))
    weights = over_files(model, 0)
    assert weights.in_files
    assert weights._reader is not None
    for (
        block
    ) in weights.blocks:  # a truncated file would be a bus error for whoever maps it: one that ends early instead
        (tmp_path / "end").write_bytes(b"")
        block.places = [Place(str(tmp_path / "end"), 0, place.size) for place in block.places or ()]
    for _ in range(2):  # nor does it go on with what a slot held before
        with pytest.raises(StorageError, match=r"--max-host-memory: layers cannot be read: .*shorter than it was"):
            taken(model, LORA, 1)


def quantised() -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    from zotune.models.quantized import steadied

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    four = bnb.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        quant_type="nf4",
                        compute_dtype=torch.float32,
                    )
                    four.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(owner, name, four.to("cpu"))
    return steadied(model, own_dtype=False).eval()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_over_layers_of_4_bits_are_those_of_ones_that_stay(device):
    stay, go = adapted(quantised()).to(device), adapted(quantised())
    plan = plan_of(go)
    packed = [p for _, _, params in plan.blocks for p in params]
    assert {str(getattr(p, "dtype", "scales")) for p in packed} == {"torch.uint8", "scales"}
    weights = stream(go, plan, device, 2)
    (_, ours), (_, theirs) = taken(go, LORA, device=device), taken(stay, LORA, device=device)
    assert ours == theirs
    assert weights.moved_in > weights.host_bytes > 4 * 4 * 512 * 512 // 2


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_of_a_rate_is_of_the_values_of_layers_of_4_bits_that_stream(device):
    stay, go = adapted(quantised()).to(device), adapted(quantised())
    stream(go, plan_of(go), device, 2)
    ours, theirs = (scale_of([p for p in model.parameters() if p.requires_grad], model) for model in (go, stay))
    assert ours == theirs
    whole = [p for p in stay.parameters() if p.is_floating_point()]
    assert ours != pytest.approx(scale_of(whole), rel=0.1)
