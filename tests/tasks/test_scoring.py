"""Batched, padded, head-at-a-few-positions scoring is that of each sequence alone with all its logits."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf
from torch import nn

from zotune.estimates.tally import Allocations
from zotune.models.schemes import get_scheme
from zotune.tasks import scoring
from zotune.tasks.encoding import Collator, Encoded
from zotune.tasks.metrics import accuracy
from zotune.tasks.scoring import answer_losses, candidate_losses, candidate_scores, score_rows, shared_scores

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": tf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
    "opt": tf.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "gpt2": tf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(params=[*MODELS, "lora"])
def model(request):
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(MODELS.get(request.param, MODELS["llama"])).double().eval()
    return get_scheme("lora").prepare(made).double().eval() if request.param == "lora" else made


def rows(words: str) -> list[Encoded]:
    """Prompts of different lengths; words of one token, of several, or of several and as many as a row likes."""
    draw = random.Random(0)

    def ids(low, high):
        return tuple(draw.randrange(50) for _ in range(draw.randrange(low, high)))

    made = []
    for _ in range(9):
        count = draw.randrange(2, 5) if words == "ragged" else 2
        answers = tuple(ids(1, 2 if words == "single" else 4) for _ in range(count))
        made.append(Encoded(ids(1, 12), answers, draw.randrange(count)))
    return made


def alone(model, prompt, answer) -> torch.Tensor:
    """Mean log-probability of the answer's tokens, float32 logits as the batch has them."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]).mean()


@torch.no_grad()
@pytest.mark.parametrize("words", ["single", "several", "ragged"])
@pytest.mark.parametrize("pad", [0, 7])
def test_losses_and_scores_are_those_of_each_sequence_alone(model, words, pad):
    given = rows(words)
    expected = [[alone(model, row.prompt, answer) for answer in row.candidates] for row in given]
    scores = candidate_scores(model, Collator("candidates", pad, multiple=8)(given))
    for row, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(row[: len(theirs)], torch.stack(theirs), rtol=1e-5, atol=1e-5)
        assert (row[len(theirs) :] == float("-inf")).all()
    right = torch.stack([-theirs[row.label] for row, theirs in zip(given, expected, strict=True)])
    torch.testing.assert_close(answer_losses(model, Collator("answer", pad)(given)), right, rtol=1e-5, atol=1e-5)
    entropy = [-torch.stack(t).log_softmax(0)[row.label] for row, t in zip(given, expected, strict=True)]
    losses = candidate_losses(model, Collator("candidates", pad)(given))
    torch.testing.assert_close(losses, torch.stack(entropy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_come_back_in_their_order_whatever_the_batch(model, batch_size):
    given = rows("ragged")
    scores = score_rows(model.train(), given, batch_size=batch_size, pad_id=3)
    assert model.training
    model.eval()
    with torch.no_grad():
        for row, ours in zip(given, scores, strict=True):
            theirs = [float(alone(model, row.prompt, answer)) for answer in row.candidates]
            assert ours == pytest.approx(theirs, abs=1e-5)
    best = [max(range(len(s)), key=s.__getitem__) == row.label for s, row in zip(scores, given, strict=True)]
    assert accuracy(scores, given) == 100 * sum(best) / len(best)


def test_the_head_sees_only_the_positions_that_the_loss_needs():
    model = tf.AutoModelForCausalLM.from_config(MODELS["llama"]).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    given = rows("several")
    answer_losses(model, Collator("answer", 0)(given))
    assert seen == [(len(given), max(len(row.candidates[row.label]) for row in given))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_many_answer_tokens_need_no_copies_of_all_logits(dtype, monkeypatch):
    logits = torch.randn(6, 40, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.randint(0, 500, (6, 40), generator=torch.Generator().manual_seed(1))
    targets[0, 3] = -100
    wanted = -logits.double().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    wanted[0, 3] = 0
    torch.testing.assert_close(scoring.token_nll(logits, targets).double(), wanted, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(scoring, "NLL_BYTES", 4 * 500 * 23)  # does not divide the rows
    given = nn.Module()
    given.register_buffer("logits", logits)
    with torch.no_grad(), Allocations(given) as live:
        found = scoring.token_nll(logits, targets)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert live.peak < 3 * scoring.NLL_BYTES < 4 * logits.numel() / 3
    grown = logits.float().clone().requires_grad_()
    scoring.token_nll(grown, targets).sum().backward()
    reference = logits.double().requires_grad_()
    nn.functional.cross_entropy(reference.transpose(1, 2), targets, reduction="sum").backward()
    torch.testing.assert_close(grown.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_prompt_that_is_read_once_gives_the_scores_of_whole_sequences(model, batch_size, monkeypatch):
    given = rows("ragged") + rows("single")
    apart = score_rows(model, given, batch_size=4, pad_id=3)
    monkeypatch.setattr(scoring, "SHARED_TOKENS", 0)
    read = []
    monkeypatch.setattr(scoring, "shared_scores", lambda *a, **k: read.append(a[1]) or shared_scores(*a, **k))
    once = score_rows(model, given, batch_size=batch_size, pad_id=3)
    assert len(read) == sum(max(map(len, row.candidates)) > 1 for row in given) > 5
    for a, b in zip(apart, once, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
def test_an_adapter_that_takes_the_caches_place_reads_whole_sequences(scheme, monkeypatch):
    torch.manual_seed(0)
    made = get_scheme(scheme).prepare(tf.AutoModelForCausalLM.from_config(MODELS["llama"]).eval()).eval()
    given = rows("ragged")
    apart = score_rows(made, given, batch_size=4, pad_id=3)
    monkeypatch.setattr(scoring, "SHARED_TOKENS", 0)
    assert score_rows(made, given, batch_size=4, pad_id=3) == apart
