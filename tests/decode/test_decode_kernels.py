"""A decode step's kernels, in Triton's interpreter where there is no GPU, beside float64 and beside what torch does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoders import EPS, MEMBERS, REQUESTS, directions_of, model_of
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zotune.decode import Settings, decoder_for
from zotune.decode.board import Board
from zotune.decode.cache import Slots
from zotune.engines import parts

decode_kernels = pytest.importorskip("zotune.decode.kernels", reason="triton is missing")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    heads=st.integers(1, 2),
    sharing=st.sampled_from([1, 3, 7, 8, 17]),
    wide=st.sampled_from([16, 64, 80, 128]),
    window=st.sampled_from([None, 1, 5, 64, 400]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=30)
def test_a_token_attends_to_its_slot_s_columns(lengths, heads, sharing, wide, window, softcap, dtype):
    """And its key and value are written; columns behind it hold NaN, which nobody looks at. The longest slot is full."""
    slots, columns, scaling = len(lengths), max(lengths), 0.3
    draw = torch.Generator().manual_seed(sum(lengths))
    keys, values = (torch.randn(slots, heads, columns, wide, generator=draw).to(DEVICE, dtype) for _ in range(2))
    for slot, length in enumerate(lengths):
        keys[slot, :, length - 1 :] = values[slot, :, length - 1 :] = torch.nan
    # as models hand them: heads beside one another in a row, and contiguous
    q = torch.randn(slots, 1, heads * sharing, wide, generator=draw).to(DEVICE, dtype).transpose(1, 2)[:, :, 0]
    k = torch.randn(slots, heads, wide, generator=draw).to(DEVICE, dtype)
    v = torch.randn(slots, 1, 2 * heads, wide, generator=draw).to(DEVICE, dtype).transpose(1, 2)[:, ::2, 0]
    at = torch.tensor(lengths, device=DEVICE) - 1
    out = decode_kernels.attend(q, k, v, keys, values, at, scaling, softcap, window)
    for slot, length in enumerate(lengths):
        assert torch.equal(keys[slot, :, length - 1], k[slot])
        assert torch.equal(values[slot, :, length - 1], v[slot])
        assert bool(keys[slot, :, length:].isnan().all())
        first = 0 if window is None else max(0, length - window)
        own_k, own_v = (t[slot, :, first:length].double().repeat_interleave(sharing, 0) for t in (keys, values))
        scores = (own_k @ q[slot].double()[:, :, None])[:, :, 0] * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        wanted = (scores.softmax(-1)[:, None] @ own_v)[:, 0]
        near = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        assert float((out[slot].double() - wanted).abs().max()) <= near * float(own_v.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "chosen", [Settings(3, ends=(4, 9)), Settings(3), Settings(3, 0.7, ends=(4,)), Settings(3, 0.7, top_k=5)], ids=str
)
def test_a_board_is_written_as_torch_writes_it(chosen, dtype, monkeypatch):
    """Rows of many pieces: alive and not, with NaN, with infinities, at an end, at the limit; all slots, and some of them."""
    monkeypatch.setattr(decode_kernels, "PIECE", 16)
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 70, generator=draw).to(DEVICE, dtype)
    logits[1, 4] = logits[2, 69] = 20.0
    logits[3, 30], logits[4, 8], logits[5] = torch.nan, torch.inf, -torch.inf
    logits[6, [17, 60]] = 30.0  # of two the first
    boards = []
    for served in (set(), {DEVICE}):
        monkeypatch.setattr(parts, "KERNEL_DEVICES", served)
        board = Board(Slots(9, 40, torch.device(DEVICE)), chosen)
        board.alive_S[:] = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
        board.limit_S[:] = torch.tensor([3, 3, 3, 3, 3, 3, 2, 1, 3])
        board.start_S[:] = torch.arange(9) + 2
        board.seeds_SK[:] = torch.arange(27).view(9, 3).to(DEVICE)
        for turn in range(3):
            board.write(board.slots.all_S, logits.roll(turn, 1))
        some = torch.tensor([7, 0], device=DEVICE)
        board.alive_S[some], board.count_S[some], board.limit_S[some] = True, 0, 3
        board.write(some, logits[[2, 6]])
        boards.append(board)
    theirs, ours = boards
    assert bool(ours.finite_S.any())
    assert not bool(ours.finite_S.all())
    odd = torch.tensor([3, 4, 5])  # where no answer is finite, which token is written is nobody's business
    for name, value in vars(theirs).items():
        if name.endswith(("_S", "_SK")):
            for slot in range(9):
                if name == "finite_S" or slot not in odd:
                    assert torch.equal(vars(ours)[name][slot], value[slot]), (name, slot)
    assert torch.equal(ours.slots.at_S[[0, 1, 2, 6, 7, 8]], theirs.slots.at_S[[0, 1, 2, 6, 7, 8]])


SERVED = ["llama", "qwen2", "mistral-window", "gemma3-window", "gemma2-window", "gpt2"]


@pytest.mark.parametrize(
    ("name", "rank"),
    [*((name, None) for name in SERVED)]
    + [pytest.param(name, rank, marks=pytest.mark.slow) for name, rank in [("llama", 1), ("qwen2", 2), ("gpt2", 1)]],
)
def test_a_loop_by_kernels_writes_what_one_without_does(name, rank, monkeypatch):
    model = model_of(name).to(DEVICE)
    chosen = Settings(max_new_tokens=4, ends=(3, 5, 17))
    found = []
    for served in (set(), {DEVICE}):
        monkeypatch.setattr(parts, "KERNEL_DEVICES", served)
        decoder, _ = decoder_for(model, directions_of(model), EPS, rank=rank, slots=4)
        found.append(decoder.generate(REQUESTS[1:7], MEMBERS, settings=chosen, seed=0, step=0))
        assert decoder.name == "slots"
        assert decoder.reader.attention.serves is bool(served)
    assert found[0] == found[1]


def test_a_kernel_that_gives_other_answers_is_found_out_and_left(monkeypatch):
    """By the first answers; the loop goes on with the model's own attention."""
    model = model_of("llama").to(DEVICE)
    chosen = Settings(max_new_tokens=5)
    monkeypatch.setattr(parts, "KERNEL_DEVICES", set())
    plain, _ = decoder_for(model, directions_of(model), EPS, rank=None, slots=4)
    wanted = plain.generate(REQUESTS[:6], MEMBERS, settings=chosen, seed=0, step=0)
    monkeypatch.setattr(parts, "KERNEL_DEVICES", {DEVICE})
    right = decode_kernels.attend
    monkeypatch.setattr(decode_kernels, "attend", lambda *args: right(*args).flip(1))
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=None, slots=4)
    assert decoder.generate(REQUESTS[:6], MEMBERS, settings=chosen, seed=0, step=0) == wanted
    assert (decoder.name, decoder.reader.attention.serves) == ("slots", False)


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_what_asks_for_more_than_a_mask_says_is_not_served(name, monkeypatch):
    """Positions enter as a bias of the scores there."""
    model = model_of(name).to(DEVICE)
    monkeypatch.setattr(parts, "KERNEL_DEVICES", {DEVICE})
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=None, slots=4)
    decoder.generate(REQUESTS[:6], MEMBERS, settings=Settings(max_new_tokens=3), seed=0, step=0)
    assert (decoder.name, decoder.reader.attention.serves) == ("slots", False)


def test_a_layer_that_no_longer_fits_is_computed_as_the_model_does(monkeypatch):
    """What has been learnt holds until a layer asks for something else; what models look up is as it was, before and after."""
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    model = model_of("llama").to(DEVICE)
    monkeypatch.setattr(parts, "KERNEL_DEVICES", {DEVICE})
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=None, slots=4)
    chosen, requests = Settings(max_new_tokens=5), REQUESTS[:4]
    wanted = decoder.generate(requests, [], settings=chosen, seed=0, step=0)
    assert decoder.reader.attention.serves
    monkeypatch.setattr(decode_kernels, "WIDEST_HEAD", 4)
    assert decoder.generate(requests, [], settings=chosen, seed=0, step=0) == wanted
    assert decoder.reader.attention.serves is False
    assert before == ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.gpu
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("rank", "temperature"), [(1, 0.0), (1, 0.8), (None, 0.0)])
def test_captured_steps_write_what_generate_writes(name, rank, temperature):
    """In float32, 24 tokens of prompts that share no length; the second call finds the graphs of the first, drawn the same."""
    model = model_of(name).to("cuda")
    chosen = Settings(max_new_tokens=24, temperature=temperature, ends=(3, 5))
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=rank, slots=6)
    plain, _ = decoder_for(model, directions_of(model), EPS, rank=rank, name="generate")
    for step in range(3):
        members = [(seed + step, sign) for seed, sign in MEMBERS]
        wanted = plain.generate(REQUESTS, members, settings=chosen, seed=0, step=step)
        found = decoder.generate(REQUESTS, members, settings=chosen, seed=0, step=step)
        alike = sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True))
        assert alike >= len(REQUESTS) - 1  # one may part where two tokens are as likely but for rounding
    assert (decoder.name, decoder.reader.attention.serves, decoder.reader.uncaptured) == ("slots", True, set())
    assert any(loop._graph is not None for loop in decoder._kept.values())
    assert any(prompts.graph is not None for loop in decoder._kept.values() for prompts in loop._prompts.values())
