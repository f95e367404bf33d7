"""A step of a loop is what a graph may hold: it finds everything where it was, whatever is dealt, written or updated in between."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from test_decoders import EPS, MEMBERS, REQUESTS, directions_of, model_of
from torch.utils._python_dispatch import TorchDispatchMode

from zotune.decode import Request, Settings, decoder_for
from zotune.decode import loop as loops
from zotune.decode.prompts import Prompts
from zotune.decode.slots import KEPT
from zotune.directions import Directions


class Tape(TorchDispatchMode):
    """A step's operations and their tensors: replayed, each reads and writes where it did before, as a graph's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.of, self.replays = [], (), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            if isinstance(result, float):  # a CPU's look at attention's queries: none on a card
                continue
            pairs = (
                [(result, again)] if isinstance(result, torch.Tensor) else zip(result or (), again or (), strict=True)
            )
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_a_card(monkeypatch, decoder) -> list[Tape]:
    """The decoder does what it would on CUDA, where a tape stands in for a graph. Returns the tapes."""
    tapes: list[Tape] = []

    def capture(run, pool=None):
        tape = Tape()
        of = run.__self__
        before = {name: t.clone() for name, t in state_of(of).items()}
        with tape:
            run()
        for name, t in state_of(of).items():
            t.copy_(before[name])  # a capture does nothing yet
        tape.of = ("prompts", *of.ids_nT.shape) if isinstance(of, Prompts) else ("step", len(of.slots))
        tapes.append(tape)
        return tape

    def state_of(of):
        found = {f"board.{k}": v for k, v in vars(of.board).items() if k.endswith(("_S", "_SK"))}
        for i, layer in enumerate(of.logits.args[0].layers if isinstance(of, Prompts) else of.cache.layers):
            found |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
        return found | {"at": of.slots.at_S}

    monkeypatch.setattr(loops, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    decoder.on_card, decoder.reader.graphs = True, True
    return tapes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-window", "bloom"])
def test_replayed_steps_write_what_steps_do(name, monkeypatch):
    """Fewer slots than requests, ends at unlike tokens; three steps with other seeds and weights, by the same graphs."""
    model = model_of(name)
    settings = Settings(max_new_tokens=20, ends=(3, 5, 17))
    plain, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=6)
    captured, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=6)
    tapes = on_a_card(monkeypatch, captured)
    for step in range(3):
        members = [(seed + step, sign) for seed, sign in MEMBERS]
        wanted = plain.generate(REQUESTS, members, settings=settings, seed=0, step=step)
        assert captured.generate(REQUESTS, members, settings=settings, seed=0, step=step) == wanted
        for param in model.parameters():
            param.data.mul_(-0.9)
    assert captured.name == "slots"
    replays = {kind: sum(tape.replays for tape in tapes if tape.of[0] == kind) for kind in ("step", "prompts")}
    assert replays["step"] > 2 * settings.max_new_tokens
    assert replays["prompts"] > 2
    assert len({tape.of for tape in tapes}) == len(tapes)  # each of a kind and a shape is captured once


def test_loops_of_other_weights_are_made_anew_and_few_are_kept(monkeypatch):
    model = model_of("llama")
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    on_a_card(monkeypatch, decoder)
    for most in range(2, 2 + KEPT + 2):
        decoder.generate(REQUESTS[:9], MEMBERS, settings=Settings(max_new_tokens=most), seed=0, step=0)
    assert len(decoder._kept) == KEPT
    settings = Settings(max_new_tokens=12)
    decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
    for param in model.parameters():
        param.data = param.data * 0.5  # elsewhere in memory
    fresh, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    wanted = fresh.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
    assert decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0) == wanted


def test_a_step_that_cannot_be_captured_is_taken_without(monkeypatch, caplog):
    model = model_of("llama")
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    on_a_card(monkeypatch, decoder)

    def refuse(run, pool=None):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(loops, "capture", refuse)
    plain, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    settings = Settings(max_new_tokens=12)
    wanted = plain.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0)
    assert decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0) == wanted
    for what in "steps", "prompts":
        assert caplog.text.count(f"decode: {what} are not captured as CUDA graphs (operation not permitted when") == 1


def test_answers_do_not_depend_on_how_many_slots_there_are():
    model = model_of("qwen2")
    settings = Settings(max_new_tokens=14, ends=(3, 5, 17))
    told: list[int] = []
    found = []
    for slots in (1, 3, 8, 64):
        decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=slots)
        told.clear()
        found.append(decoder.generate(REQUESTS, MEMBERS, settings=settings, seed=0, step=0, advance=told.append))
        assert sum(told) == len(REQUESTS)
    assert found[0] == found[1] == found[2] == found[3]


def test_no_request_is_no_answer():
    model = model_of("llama")
    for name in ("slots", "generate"):
        decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, name=name)
        assert decoder.generate([], [], settings=Settings(4), seed=0, step=0) == []


def test_directions_that_are_drawn_from_groups_have_an_eps_each():
    """Of two parameter groups the second is not displaced at all: as if its parameters had no direction."""
    model = model_of("llama")
    own = list(model.named_parameters())
    first, second = own[::2], own[1::2]
    both, _ = decoder_for(model, Directions([first, second]), (EPS, 0.0), rank=1, slots=4)
    alone, _ = decoder_for(model, Directions([first]), EPS, rank=1, slots=4, name="generate")
    settings = Settings(max_new_tokens=10)
    requests = [Request(r.prompt, r.row, r.member) for r in REQUESTS]
    wanted = alone.generate(requests, MEMBERS, settings=settings, seed=0, step=0)
    assert both.generate(requests, MEMBERS, settings=settings, seed=0, step=0) == wanted


def test_a_padded_prompt_asks_for_no_position_that_a_table_lacks(monkeypatch):
    """Prompts are padded to 64 tokens there, and the table has 50 positions."""
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=50)).eval()
    decoder, _ = decoder_for(model, directions_of(model), EPS, rank=1, slots=4)
    tapes = on_a_card(monkeypatch, decoder)
    plain, _ = decoder_for(model, directions_of(model), EPS, rank=1, name="generate")
    requests = [Request(tuple(range(1, 1 + n)), row, 0) for row, n in enumerate((49, 47, 20))]
    settings = Settings(max_new_tokens=12)
    wanted = plain.generate(requests, MEMBERS, settings=settings, seed=0, step=0)
    assert decoder.generate(requests, MEMBERS, settings=settings, seed=0, step=0) == wanted
    assert decoder.name == "slots"
    assert tapes
