"""Left-to-right generation: every cached step against a whole forward, the distribution of its samples, its padding."""

import pytest
import torch
from helpers.causal import EOS, PAD, pair_batch, tiny_causal

from datamodules.batch import pack_prompt_response
from models.backbones.autoregressive import AutoregressiveDecoder, generate_autoregressive
from models.backbones.causal_lm import causal_nll, with_adapters
from models.functional.next_token import causal_text
from models.objectives.span_corruption import SpanCorruption


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(kind: str):
    model = tiny_causal(architecture="qwen3" if kind == "adapted" else kind).eval()
    if kind == "adapted":
        model = with_adapters(model, 2).eval()
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("whole_prompt", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "adapted"])
def test_every_cached_step_is_a_whole_forward(kind, whole_prompt, monkeypatch):
    """Left padding, an empty prompt: the logits of each step are those of the objective that reads the text at once."""
    model, rows, seen = model_of(kind), pair_batch(), []

    def watch(logits, temperature, generator):
        seen.append(logits)
        return logits.argmax(-1)

    monkeypatch.setattr("models.backbones.autoregressive.sample_categorical", watch)
    text = generate_autoregressive(model, rows, draw(), temperature=0.0, whole_prompt=whole_prompt)
    assert text.shape == (3, 4)
    assert len(seen) == 4  # one forward for each token
    stepwise = -torch.stack(
        [logits.log_softmax(-1).gather(-1, text[:, k : k + 1])[:, 0] for k, logits in enumerate(seen)], -1
    )
    whole = rows | {"input_ids": torch.cat([rows["input_ids"][:, :3], text], -1)}
    with torch.no_grad():
        if whole_prompt:
            at_once = SpanCorruption().text_nll(model, whole, draw())[:, 3:]
        else:
            at_once = causal_nll(model, causal_text(whole))[:, 2:]
    torch.testing.assert_close(stepwise, at_once, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    model = model_of("llama")
    rows = {
        columns: pack_prompt_response([[3, 4]], [[]], prompt_length=columns, response_length=5, pad_id=PAD, eos_id=EOS)
        for columns in (2, 6)
    }
    texts = [generate_autoregressive(model, given, draw(), temperature=1.0) for given in rows.values()]
    assert torch.equal(*texts)


def test_samples_have_the_models_own_probabilities():
    """Two tokens over a vocabulary of five: frequencies of all 25 texts against the model, and not against a warmer one."""
    model = tiny_causal(vocab_size=5).eval()
    n = 20_000
    rows = pack_prompt_response([[3, 4]] * n, [[]] * n, prompt_length=2, response_length=2, pad_id=PAD, eos_id=EOS)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[3, 4]])).logits[0, -1]
        second = torch.stack([model(input_ids=torch.tensor([[3, 4, a]])).logits[0, -1] for a in range(5)])

    def distance(temperature: float) -> float:
        truth = (first / temperature).softmax(-1).unsqueeze(-1) * (second / temperature).softmax(-1)
        return float((frequency - truth).abs().sum() / 2)

    texts = AutoregressiveDecoder(model, 2)(rows, draw())
    frequency = torch.bincount(texts[:, 0] * 5 + texts[:, 1], minlength=25).view(5, 5) / n
    assert distance(1.0) < 0.02
    assert distance(1.3) > 0.02


def test_greedy_takes_the_most_probable_token_and_the_decoder_says_what_it_is():
    model, rows = model_of("llama"), pair_batch()
    sampled, greedy = AutoregressiveDecoder(model, 4), AutoregressiveDecoder(model, 4, temperature=0.0)
    assert (sampled.name, sampled.method, sampled.forwards) == ("autoregressive", "teacher", 4)
    assert greedy.name == "autoregressive, greedy"
    text = greedy(rows, draw())
    assert torch.equal(text, greedy(rows, draw(1)))
    assert not torch.equal(sampled(rows, draw()), sampled(rows, draw(1)))
    ids = rows["input_ids"][:1, :3]
    for k in range(4):
        best = model(input_ids=ids).logits[0, -1].argmax()
        assert best == text[0, k]
        ids = torch.cat([ids, best.view(1, 1)], -1)


def test_each_of_several_end_tokens_stops_a_text_as_in_transformers():
    """A forward pass for each token until the last text has ended, and the first end token behind it."""
    model, rows = (
        model_of("llama"),
        pack_prompt_response(
            [[3, 4], [5, 6], [9, 3]], [[]] * 3, prompt_length=2, response_length=8, pad_id=PAD, eos_id=EOS
        ),
    )
    ids, passes = rows["input_ids"][:, :2], []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    free = AutoregressiveDecoder(model, 8, temperature=0.0)(rows, draw())
    ends = list(dict.fromkeys(free[:, 3].tolist()))  # all have ended with their fourth token
    passes.clear()
    found = AutoregressiveDecoder(model, 8, temperature=0.0, end_ids=ends)(rows, draw())
    assert len(ends) > 1
    assert len(passes) <= 4
    hook.remove()
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])[:, 2:]
    assert torch.equal(found[:, : theirs.shape[1]], theirs)
    assert (found[:, theirs.shape[1] :] == ends[0]).all()


def test_a_stop_rule_ends_the_generation_with_the_last_text_that_it_stops():
    model, rows, passes = model_of("llama"), pair_batch(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    free = AutoregressiveDecoder(model, 4, temperature=0.0)(rows, draw())
    asked = []

    def stop(tokens):  # the first row after one token, the others after two
        asked.append(tokens.clone())
        return torch.tensor([tokens.shape[1] == 1, tokens.shape[1] == 2, tokens.shape[1] == 2])

    passes.clear()
    found = AutoregressiveDecoder(model, 4, temperature=0.0, stop=stop)(rows, draw())
    assert len(passes) == 2
    assert torch.equal(found[:, :2], free[:, :2])
    assert [tokens.tolist() for tokens in asked] == [free[:, :n].tolist() for n in (1, 2)]


def test_padding_of_the_output_layer_is_never_said():
    model, rows = model_of("llama"), pair_batch()
    many = {name: column.repeat(50, 1) for name, column in rows.items()}
    assert AutoregressiveDecoder(model, 4, vocab_size=5)(many, draw()).max() < 5
    assert AutoregressiveDecoder(model, 4)(many, draw()).max() >= 5
