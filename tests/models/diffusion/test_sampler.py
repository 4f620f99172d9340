"""The sampler against sequential greedy decoding by hand, an exact posterior, and its own schedule."""

import math

import pytest
import torch

from models.diffusion.sampler import MaskedDiffusionDecoder, generate_masked_diffusion, linear_transfer_counts
from models.functional.errors import UsageError
from models.functional.gumbel import sample_categorical


def _rows(model, batch=3, prompt=2, response=6):
    ids = torch.randint(3, 11, (batch, prompt + response))
    mask = torch.zeros(batch, prompt + response, dtype=torch.bool)
    mask[:, prompt:] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask), "response_mask": mask}


def test_transfer_counts_are_even_with_the_rest_first():
    assert linear_transfer_counts(10, 4) == [3, 3, 2, 2]
    assert linear_transfer_counts(4, 4) == [1, 1, 1, 1]


@torch.no_grad()
def test_one_token_a_step_at_temperature_zero_is_sequential_greedy(tiny_llada):
    """Written out by hand: fill in the most probable token of all masked places, one at a time."""
    model, generator = tiny_llada(), torch.Generator().manual_seed(0)
    rows = _rows(model)
    ours = generate_masked_diffusion(model, rows, generator, steps=6, temperature=0.0, remasking="low_confidence")
    for row in range(3):
        text = rows["input_ids"][row : row + 1].clone()
        text[0, 2:] = 2
        for _ in range(6):
            logits = model(text)[0]
            logits[:, 2] = -math.inf
            p = logits.double().softmax(-1)
            best, word = p.max(-1)
            best[text[0] != 2] = -1.0
            place = int(best.argmax())
            text[0, place] = word[place]
        assert torch.equal(ours[row], text[0, 2:])


@torch.no_grad()
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_end_tokens_are_committed_after_all_others(tiny_llada, remasking):
    """By hand: in each pass the surest position whose most probable token ends no text, an end token where all do."""
    model, rows, ends = tiny_llada(), None, (5, 7, 9)
    with torch.no_grad():
        model.lm_head.weight[list(ends)] *= 1.5  # end tokens are probable at some positions
    rows = _rows(model, batch=16)
    options = {"steps": 6, "temperature": 0.0, "remasking": remasking}
    written = []

    def keep(response):
        written.append(response)

    last = generate_masked_diffusion(
        model, rows, torch.Generator().manual_seed(0), ends_last=ends, on_tokens=keep, **options
    )
    usual = generate_masked_diffusion(model, rows, torch.Generator().manual_seed(0), **options)
    chosen_end = 0
    text = torch.where(rows["response_mask"], 2, rows["input_ids"])
    for committed in written:
        logits = model(text)[:, 2:]
        logits[..., 2] = -math.inf
        p, word = logits.double().softmax(-1).max(-1)
        open_, end = text[:, 2:] == 2, torch.isin(word, torch.tensor(ends))
        others = open_ & ~end
        new = committed != text[:, 2:]
        assert torch.equal(new.sum(-1), torch.ones(16, dtype=torch.long))
        assert torch.equal(committed[new], word[new])
        for row in range(16):
            allowed = others[row] if others[row].any() else open_[row]
            assert allowed[new[row]].all()
            if remasking == "low_confidence":
                assert p[row][new[row]] == p[row][allowed].max()
            chosen_end += int(end[row][new[row]] and others[row].any())
        text[:, 2:] = committed
    assert chosen_end == 0
    assert torch.isin(last, torch.tensor(ends)).any()
    assert not torch.equal(last, usual)


@torch.no_grad()
def test_blocks_fill_from_left_to_right(tiny_llada):
    """With two blocks the first is decided while the whole second one is still masked."""
    model, generator = tiny_llada(), torch.Generator().manual_seed(0)
    rows = _rows(model)
    two = generate_masked_diffusion(
        model, rows, generator, steps=6, block_length=3, temperature=0.0, remasking="low_confidence"
    )
    half = {name: column.clone() for name, column in rows.items()}
    text = half["input_ids"]
    text[:, 2:] = 2
    for _ in range(3):
        logits = model(text)
        logits[..., 2] = -math.inf
        best, word = logits.double().softmax(-1).max(-1)
        best[text != 2] = -1.0
        best[:, 5:] = -1.0
        place = best.argmax(-1, keepdim=True)
        text.scatter_(1, place, word.gather(1, place))
    assert torch.equal(two[:, :3], text[:, 2:5])


def test_guidance_zero_is_the_conditional_model_and_guidance_moves_it(tiny_llada):
    model = tiny_llada()
    rows = _rows(model, batch=8)
    run = [
        generate_masked_diffusion(model, rows, torch.Generator().manual_seed(0), steps=3, temperature=0.0, guidance=w)
        for w in (0.0, 0.0, 4.0)
    ]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])


@torch.no_grad()
def test_guided_logits_follow_the_formula(tiny_llada):
    from models.diffusion.sampler import guided_logits

    model = tiny_llada()
    rows = _rows(model)
    xt = torch.where(rows["response_mask"], 2, rows["input_ids"])
    blind = torch.full_like(xt, 2)
    conditional, unconditional = model(xt)[:, 2:], model(blind)[:, 2:]
    expected = unconditional + 2.5 * (conditional - unconditional)
    ours = guided_logits(model, rows, 1.5)(xt, 0, 6)
    keep = torch.arange(11) != 2
    torch.testing.assert_close(ours[..., keep], expected[..., keep])
    assert ours[..., 2].isinf().all()
    part = guided_logits(model, rows, 1.5)(xt, 1, 4)
    torch.testing.assert_close(part[..., keep], expected[:, 1:4, keep])


def test_prompt_and_padding_do_not_matter_where_they_should_not(tiny_llada):
    """Left padding changes nothing; the response's own ids are never looked at."""
    model = tiny_llada()
    rows = _rows(model)
    padded = {
        "input_ids": torch.nn.functional.pad(rows["input_ids"], (3, 0), value=0),
        "attention_mask": torch.nn.functional.pad(rows["attention_mask"], (3, 0), value=False),
        "response_mask": torch.nn.functional.pad(rows["response_mask"], (3, 0), value=False),
    }
    other = {**rows, "input_ids": torch.where(rows["response_mask"], 7, rows["input_ids"])}
    outs = [
        generate_masked_diffusion(model, r, torch.Generator().manual_seed(0), steps=4) for r in (rows, padded, other)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_sample_categorical_samples_the_softmax():
    """G-test over 40000 draws; draws at another temperature fail it."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(40000, 4)

    def g_statistic(temperature):
        drawn = sample_categorical(logits, temperature, torch.Generator().manual_seed(0))
        counts = torch.bincount(drawn, minlength=4).double()
        return float(2 * torch.xlogy(counts, counts / (40000 * p)).sum())

    assert g_statistic(1.0) < 16.3  # 0.1 % point of chi-square with 3 degrees of freedom
    assert g_statistic(0.9) > 16.3
    assert sample_categorical(logits[:1], 0.0, torch.Generator()).item() == 0


class ExactPosterior(torch.nn.Module):
    """Stands for a model: tells the exact posterior of two equal tokens (3 3) or (4 4), from which ones are masked."""

    mask_id = 2

    def embed(self, ids):
        return ids

    def hidden(self, ids, attention_mask, response_mask=None):
        known = ids.masked_fill(ids == 2, 0).amax(1)
        return known.unsqueeze(1).expand(ids.shape)

    def lm_head(self, known):
        logits = torch.full((*known.shape, 5), -50.0)
        logits[..., 3] = torch.where(known == 4, -50.0, 0.0)
        logits[..., 4] = torch.where(known == 3, -50.0, 0.0)
        return logits


def test_ancestral_sampling_with_an_exact_posterior_is_exact_and_one_step_is_not():
    rows = {
        "input_ids": torch.zeros(4000, 2, dtype=torch.long),
        "attention_mask": torch.ones(4000, 2, dtype=torch.bool),
        "response_mask": torch.ones(4000, 2, dtype=torch.bool),
    }
    two, one = (
        generate_masked_diffusion(ExactPosterior(), rows, torch.Generator().manual_seed(0), steps=n) for n in (2, 1)
    )
    assert (two[:, 0] == two[:, 1]).all()
    assert abs((two[:, 0] == 3).double().mean() - 0.5) < 0.04
    assert abs((one[:, 0] == one[:, 1]).double().mean() - 0.5) < 0.04  # the product of marginals


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_decoder_takes_as_many_forward_passes_as_it_names(tiny_llada, guidance, monkeypatch):
    model, taken = tiny_llada(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *arguments, **more: taken.append(1) or hidden(*arguments, **more))
    decoder = MaskedDiffusionDecoder(model, 3, guidance=guidance)
    decoder(_rows(model), torch.Generator().manual_seed(0))
    assert decoder.forwards == len(taken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 6, "block_length": 4}, "block_length=4 must divide"),
        ({"steps": 3, "block_length": 3}, "multiple of the 2 blocks"),
        ({"steps": 7}, "exceeds the 6 tokens"),
        ({"steps": 2, "remasking": "best"}, "type low_confidence or random"),
    ],
)
def test_wrong_options_are_named(tiny_llada, options, message):
    model = tiny_llada()
    with pytest.raises(UsageError, match=message):
        generate_masked_diffusion(model, _rows(model), torch.Generator(), **options)
