"""Members write by slots what a displaced copy of the model writes by transformers' `generate`."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
import transformers as tf
from families import CAUSAL, GQA, SIZES, H, V, snapshot, unchanged
from transformers import GenerationConfig

from zotune import noise
from zotune.decode import Member, Request, Settings, decoder_for
from zotune.decode.cache import SlotLayer
from zotune.decode.plain import left_out
from zotune.directions import Directions, Displacement
from zotune.errors import InputError
from zotune.models.schemes import get_scheme

SHAPE = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON = SHAPE | {"ffn_hidden_size": 48}
FAMILIES = CAUSAL | {
    "neox": tf.GPTNeoXConfig(**SIZES, max_position_embeddings=64),
    "falcon": tf.FalconConfig(**FALCON),
    "falcon-alibi": tf.FalconConfig(**FALCON, alibi=True),
    "bloom": tf.BloomConfig(vocab_size=V, hidden_size=H, n_layer=2, n_head=4),
    "mpt": tf.MptConfig(vocab_size=V, d_model=H, n_layers=2, n_heads=4, max_seq_len=64),
    "gptj": tf.GPTJConfig(vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "mistral-window": tf.MistralConfig(**GQA, sliding_window=8),
    "gemma3-window": tf.Gemma3TextConfig(**GQA, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "gemma2-window": tf.Gemma2Config(**GQA, sliding_window=8, attn_implementation="eager"),
}
OTHERS = {
    "mixtral": tf.MixtralConfig(**GQA, num_local_experts=4),
    "mamba": tf.MambaConfig(vocab_size=V, hidden_size=H, num_hidden_layers=2),
    "llama4": tf.Llama4TextConfig(**GQA, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8),
}
EPS = 0.05
MEMBERS = [Member(11, 1), Member(11, -1), Member(1 << 63 | 7, 1)]
PROMPTS = [tuple(range(3 + i, 3 + i + n)) for i, n in enumerate((5, 1, 9, 3, 22))]
REQUESTS = [Request(prompt, row, member) for member in (-1, 0, 1, 2) for row, prompt in enumerate(PROMPTS)]


def model_of(name: str) -> torch.nn.Module:
    """Weights three times as large as fresh ones, so that logits are apart and members differ."""
    torch.manual_seed(0)
    config = copy.deepcopy((FAMILIES | OTHERS)[name])
    if name in ("gemma", "bloom"):  # with one table they write the same token over and over, whatever a member is
        config.tie_word_embeddings = False
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for param in model.parameters():
        if param.dim() > 1:
            param.data.mul_(3)
    model.generation_config.eos_token_id = None  # what ends an answer is said
    return model


def directions_of(model: torch.nn.Module, distribution: str = "gaussian") -> Directions:
    return Directions([[(n, p) for n, p in model.named_parameters() if p.requires_grad]], distribution)


def displaced_copy(model: torch.nn.Module, directions: Directions, member: Member, rank: int | None) -> torch.nn.Module:
    """θ + sign·ε·z, written here from the definition."""
    other = copy.deepcopy(model)
    own = dict(other.named_parameters())
    at = Displacement((member.seed,), ((EPS * member.sign,),))
    for param in directions.params:
        name = directions.slots[id(param)].name
        if rank is None or param.dim() < 2 or rank >= min(param.shape[0], param.numel() // param.shape[0]):
            directions.displaced(param, at, own[name].data)
            continue
        sides = {"U": param.shape[0], "V": param.numel() // param.shape[0]}
        u, v = (torch.empty(n * rank) for n in sides.values())
        for side, out in zip("UV", (u, v), strict=True):
            noise.fill(out, member.seed, noise.parameter_id(f"{name}.{side}"), directions.distribution)
        z = u.view(-1, rank) @ v.view(-1, rank).t() / math.sqrt(rank)
        own[name].data += EPS * member.sign * z.view(param.shape)
    return other


def greedy(model: torch.nn.Module, prompt: tuple[int, ...], settings: Settings) -> tuple[list[int], bool]:
    """What transformers writes, and whether it ended by itself."""
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, eos_token_id=list(settings.ends) or None, pad_token_id=settings.pad, do_sample=False
    )  # fmt: skip
    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
    ended = int(written[-1]) in settings.ends
    return written.tolist()[: -1 if ended else None], ended


def agrees(model: torch.nn.Module, prompt: tuple[int, ...], found: tuple[int, ...], wanted: list[int]) -> bool:
    """The same tokens; or where they part, the two are as likely but for 1e-4."""
    parted = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if parted is None:
        return len(found) == len(wanted)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *wanted[:parted]]])).logits[0, -1]
    return abs(float(logits[found[parted]] - logits[wanted[parted]])) < 1e-4


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_member_writes_what_its_displaced_copy_writes(name, rank):
    """Prompts of 1 to 22 tokens, fewer slots than requests, three ends; by both decoders."""
    model = model_of(name)
    before, directions = snapshot(model), directions_of(model)
    copies = {i: displaced_copy(model, directions, member, rank) for i, member in enumerate(MEMBERS)} | {-1: model}
    settings = Settings(max_new_tokens=12, ends=(3, 5, 17))
    wanted = [greedy(copies[r.member], r.prompt, settings) for r in REQUESTS]
    for chosen in ("slots", "generate"):
        decoder, line = decoder_for(model, directions, EPS, rank=rank, slots=6, name=chosen)
        answers = decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
        assert (decoder.name, line) == (chosen, None)
        for request, answer, (tokens, ended) in zip(REQUESTS, answers, wanted, strict=True):
            assert agrees(copies[request.member], request.prompt, answer.tokens, tokens), (chosen, request)
            assert answer.finished == ended or answer.tokens != tuple(tokens)
            assert answer.finite
    assert len({a.tokens for a in answers}) > len(PROMPTS)  # members do differ
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-window"])
def test_both_decoders_draw_the_same_tokens(name):
    model = model_of(name)
    settings = Settings(max_new_tokens=10, temperature=1.3, top_k=40, top_p=0.95, ends=(3, 5))
    found = [
        decoder_for(model, directions_of(model), EPS, rank=1, slots=slots, name=chosen)[0].generate(
            REQUESTS, MEMBERS, settings=settings, seed=4, step=2
        )
        for chosen, slots in [("slots", 4), ("slots", 32), ("generate", 3)]
    ]
    assert found[0] == found[1] == found[2]
    assert any(answer.finished for answer in found[0])


def test_a_draw_depends_on_seed_step_and_row_and_not_on_the_member():
    model = model_of("llama")
    decoder, _ = decoder_for(model, directions_of(model), 0.0, rank=1, slots=8)

    def write(seed: int, step: int, row: int, member: int) -> tuple[int, ...]:
        request, settings = Request((5, 6, 7), row, member), Settings(max_new_tokens=16, temperature=2.0)
        return decoder.generate([request], MEMBERS, settings=settings, seed=seed, step=step)[0].tokens

    first = write(0, 0, 0, -1)
    assert first == write(0, 0, 0, 0) == write(0, 0, 0, 2)
    assert len({first, write(1, 0, 0, 0), write(0, 1, 0, 0), write(0, 0, 1, 0)}) == 4


def test_an_end_at_once_is_an_answer_of_no_token():
    model = model_of("llama")
    (first,), _ = greedy(model, PROMPTS[0], Settings(max_new_tokens=1))
    for name in ("slots", "generate"):
        decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, name=name)
        (answer,) = decoder.generate(
            [Request(PROMPTS[0], 0)], [], settings=Settings(max_new_tokens=5, ends=(90, first)), seed=0, step=0
        )
        assert (answer.tokens, answer.finished) == ((), True)


@pytest.mark.parametrize("name", ["slots", "generate"])
def test_an_answer_is_cut_where_the_model_takes_no_more(name):
    """GPT-2's table has 64 positions: the last token that may be written is one that is read nowhere."""
    model = model_of("gpt2")
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=2, name=name)
    prompts = [tuple(range(1, 1 + n)) for n in (63, 60, 4)]
    requests = [Request(prompt, row, 0) for row, prompt in enumerate(prompts)]
    answers = decoder.generate(requests, MEMBERS, settings=Settings(max_new_tokens=8), seed=0, step=0)
    assert [len(answer.tokens) for answer in answers] == [1, 4, 8]
    assert not any(answer.finished for answer in answers)


@pytest.mark.parametrize("name", ["slots", "generate"])
@pytest.mark.parametrize(
    ("prompt", "says"), [(tuple([7] * 64), "prompt 9 of 64 tokens leaves no room"), ((), "no token")]
)
def test_a_prompt_that_cannot_be_answered_is_refused_by_its_row(name, prompt, says):
    model = model_of("gpt2")
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, name=name)
    with pytest.raises(InputError, match=says):
        decoder.generate(
            [Request((1, 2), 0), Request(prompt, 9)], [], settings=Settings(max_new_tokens=8), seed=0, step=0
        )


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_written_by_generate_and_a_line_says_so(name, caplog):
    """One that mixes rows is found out by its first answers, the others by what their cache holds."""
    model = model_of(name)
    directions = directions_of(model)
    decoder, line = decoder_for(model, directions, EPS, rank=1, slots=6)
    settings = Settings(max_new_tokens=6, ends=(3,))
    with caplog.at_level(logging.WARNING, "zotune"):
        answers = decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
    assert decoder.name == "generate"
    assert "answers are written by generate" in (line or caplog.text)
    plain, _ = decoder_for(model, directions, EPS, rank=1, name="generate")
    assert answers == plain.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)


def test_a_wrong_loop_is_found_out_by_its_first_answers(monkeypatch, caplog):
    """A cache that mixes up the heads' values gives other logits, and no wrong answer."""
    right = SlotLayer.update

    def wrong(self, keys, values, *args, **kwargs):
        return right(self, keys, values.roll(1, 1), *args, **kwargs)

    model = model_of("llama")
    directions, settings = directions_of(model), Settings(max_new_tokens=6)
    plain, _ = decoder_for(model, directions, EPS, rank=1, name="generate")
    wanted = plain.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
    monkeypatch.setattr(SlotLayer, "update", wrong)
    decoder, _ = decoder_for(model, directions, EPS, rank=1)
    with caplog.at_level(logging.WARNING, "zotune"):
        assert decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0) == wanted
    assert "off those of whole sequences" in caplog.text


def test_an_update_is_seen_by_the_next_answers():
    model = model_of("llama")
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    settings = Settings(max_new_tokens=8)
    first = decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
    for param in model.parameters():
        param.data.mul_(-0.9)
    second = decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=1)
    fresh, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    assert second == fresh.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=1)
    assert first != second


def test_members_of_an_adapter_write_what_displaced_copies_write():
    model = get_scheme("lora").prepare(model_of("llama")).eval()
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_()
    directions, settings = directions_of(model), Settings(max_new_tokens=8, ends=(3,))
    copies = {i: displaced_copy(model, directions, member, 1) for i, member in enumerate(MEMBERS)} | {-1: model}
    for chosen in ("slots", "generate"):
        decoder, line = decoder_for(model, directions, EPS, rank=1, slots=6, name=chosen)
        answers = decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
        assert (decoder.name, line) == (chosen, None)
        for request, answer in zip(REQUESTS, answers, strict=True):
            own = copies[request.member]
            assert agrees(own, request.prompt, answer.tokens, greedy(own, request.prompt, settings)[0])
    assert len({a.tokens for a in answers}) > len(PROMPTS)


@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
def test_virtual_tokens_are_left_to_generate_and_a_line_says_so(scheme):
    model = get_scheme(scheme).prepare(model_of("llama")).eval()
    directions, settings = directions_of(model), Settings(max_new_tokens=6)
    decoder, line = decoder_for(model, directions, EPS, rank=1)
    assert "puts tokens of its own before a prompt" in line
    answers = decoder.generate(REQUESTS[:8], MEMBERS, settings=settings, seed=0, step=0)
    assert [list(a.tokens) for a in answers[:5]] == [greedy(model, p, settings)[0] for p in PROMPTS]


def test_weights_and_mode_are_restored_where_a_forward_fails():
    model = model_of("llama").train()
    before = snapshot(model)
    decoder, _ = decoder_for(model, directions_of(model), EPS, name="generate")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(REQUESTS, MEMBERS, settings=Settings(max_new_tokens=2), seed=0, step=0)
    handle.remove()
    assert unchanged(model, before)
    assert model.training


def test_logits_that_are_no_numbers_are_told_by_answer():
    model = model_of("llama")
    model.model.embed_tokens.weight.data[40] = torch.nan
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data.nan_to_num(0))
    for name in ("slots", "generate"):
        decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, name=name)
        answers = decoder.generate(
            [Request((5, 6), 0), Request((5, 40), 1)], [], settings=Settings(max_new_tokens=3), seed=0, step=0
        )
        assert [answer.finite for answer in answers] == [True, False]


def test_what_a_checkpoint_asks_beside_the_settings_is_left_out_and_said(caplog):
    model = model_of("llama")
    assert left_out(model) is None
    plain = greedy(model, PROMPTS[0], Settings(max_new_tokens=10))
    assert len(set(plain[0])) < 10  # the penalty would change it
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 4
    line = left_out(model)
    assert line is not None
    assert "repetition_penalty 5.0" in line
    assert "min_new_tokens 4" in line
    for name in ("slots", "generate"):
        decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, name=name)
        (answer,) = decoder.generate([Request(PROMPTS[0], 0)], [], settings=Settings(max_new_tokens=10), seed=0, step=0)
        assert list(answer.tokens) == plain[0]
    assert model.generation_config.repetition_penalty == 5.0


def test_an_unknown_decoder_is_refused_by_name():
    model = model_of("llama")
    with pytest.raises(ValueError, match="did you mean 'slots'"):
        decoder_for(model, directions_of(model), EPS, name="slot")
