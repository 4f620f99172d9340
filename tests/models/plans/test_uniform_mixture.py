"""A uniform index: its likelihood is the sum over indices, its training follows the gradient of that, its texts its law."""

from itertools import product

import pytest
import torch
from helpers.causal import EOS, tiny_causal
from helpers.concept import BASE, generator, some_texts
from torch.testing import assert_close

from models.functional.one_forward import responsibilities
from models.plans.unified import UnifiedModel
from models.plans.uniform_mixture import MixtureDecoder, UniformMixture, index_vocabulary


def mixture(indices: int = 5) -> UniformMixture:
    """In float64."""
    torch.manual_seed(0)
    model = UnifiedModel(tiny_causal(BASE), index_vocabulary(indices, BASE)).double().eval()
    return UniformMixture(model, indices, EOS)


def all_texts(length: int) -> torch.Tensor:
    """Every text of ids below BASE, cut at its first end and filled with ends."""
    texts = torch.tensor(list(product(range(BASE), repeat=length)))
    return torch.unique(texts.masked_fill((texts == EOS).cumsum(-1) > 0, EOS), dim=0)


def probability_by_hand(mix: UniformMixture, prompt, text, k: int) -> torch.Tensor:
    """p(x | k, u) of one text (R,): its tokens up to the first end, one after the other."""
    log_p = mix.logits(prompt, torch.tensor([k]), len(text))[0].log_softmax(-1)
    words = text.tolist()
    length = words.index(EOS) + 1 if EOS in words else len(words)
    return torch.stack([log_p[place, words[place]] for place in range(length)]).sum().exp()


def test_the_probability_of_a_text_is_the_mean_over_indices():
    mix, (prompt, mask) = mixture(), some_texts(4)
    prompt, mask = prompt[[0, 1, 0, 2]], mask.clone()
    mask[3, 0] = False  # a shorter prompt, padded on the left
    text = torch.tensor([[4, 5, EOS], [EOS, EOS, EOS], [6, EOS, EOS], [7, 8, 9]])
    with torch.no_grad():
        found = mix.log_prob(mix.nll_of_indices((prompt, mask), text)).exp()
        for row in range(4):
            own = prompt[row : row + 1], mask[row : row + 1]
            each = [probability_by_hand(mix, own, text[row], k) for k in range(5)]
            assert found[row] == pytest.approx(float(sum(each)) / 5)
            assert max(each) > 1.5 * min(each)  # the index matters
        other = mix.log_prob(mix.nll_of_indices((prompt.flip(0), mask.flip(0)), text)).exp()
    assert ((found / other).log().abs() > 0.01).any()  # the prompt matters


@pytest.mark.parametrize("indices", [1, 5])
def test_the_probabilities_of_all_texts_sum_to_one(indices):
    mix, texts = mixture(indices), all_texts(2)
    prompt = tuple(part.expand(len(texts), -1) for part in some_texts(1))
    with torch.no_grad():
        law = mix.log_prob(mix.nll_of_indices(prompt, texts)).exp()
        assert_close(law.sum(), torch.ones(()).double())
        mix.end_ids = None  # the control: columns after the end counted as well
        assert mix.log_prob(mix.nll_of_indices(prompt, texts)).exp().sum() < 0.995


def test_one_index_makes_tokens_independent_and_several_do_not():
    texts = all_texts(2)
    prompt = tuple(part.expand(len(texts), -1) for part in some_texts(1))
    found = {}
    for indices in (1, 5):
        mix = mixture(indices)
        with torch.no_grad():
            law = mix.log_prob(mix.nll_of_indices(prompt, texts)).exp()
        table = torch.zeros(BASE, BASE, dtype=torch.float64).index_put((texts[:, 0], texts[:, 1]), law)
        alive = table[torch.arange(BASE) != EOS]  # texts of two tokens
        alive = alive / alive.sum()
        both = alive.sum(1, keepdim=True) * alive.sum(0, keepdim=True)
        found[indices] = float((alive * (alive / both).log()).sum())
    assert found[1] == pytest.approx(0, abs=1e-9)
    assert found[5] > 1e-3


def test_the_index_is_drawn_from_its_exact_posterior():
    mix, (prompt, mask) = mixture(), some_texts(1)
    text, many = torch.tensor([[4, 5, EOS]]), 4000
    with torch.no_grad():
        each = torch.stack([probability_by_hand(mix, (prompt, mask), text[0], k) for k in range(5)])
    rows = [part.expand(many, -1) for part in (prompt, mask, text)]
    counts = mix.draw_index((rows[0], rows[1]), rows[2], generator()).bincount(minlength=5) / many
    assert (counts - each / each.sum()).abs().sum() / 2 < 0.03
    assert (counts - 0.2).abs().sum() / 2 > 0.1  # the control


def test_the_mean_gradient_of_a_drawn_index_is_that_of_the_likelihood():
    """Fisher's identity, index by index; with uniform weights instead of the posterior's it does not hold."""
    mix, (prompt, mask) = mixture(), some_texts(3)
    text, weights = torch.tensor([[4, 5, EOS], [6, 7, 8], [9, EOS, EOS]]), list(mix.model.backbone.parameters())
    nll = mix.nll_of_indices((prompt, mask), text)
    exact = torch.autograd.grad(-mix.log_prob(nll).sum(), weights)
    share = responsibilities(torch.zeros_like(nll), -nll).detach()

    def in_the_mean(of_index):
        total = sum(
            (of_index[:, k] * mix.nll((prompt, mask), torch.full((3,), k), text).sum(-1)).sum() for k in range(5)
        )
        return torch.autograd.grad(total, weights)

    for own, expected in zip(in_the_mean(share), exact, strict=True):
        assert_close(own, expected)
    uniform = in_the_mean(torch.full_like(share, 0.2))
    assert any((own - expected).abs().max() > 1e-3 for own, expected in zip(uniform, exact, strict=True))


def test_what_a_text_tells_of_its_index_by_hand():
    mix = mixture()
    nll = -torch.tensor([[0.5, 0.25, 0.25, 0, 0], [0.1, 0.1, 0.1, 0.1, 0.1], [0, 0.3, 0, 0, 0]]).double().log()
    nll = nll.masked_fill(nll.isinf(), 1e9)
    bits = torch.tensor(5.0).double().log2()
    assert_close(mix.index_bits(nll), torch.stack([bits - 1.5, bits * 0, bits]))


def test_generated_texts_follow_the_law():
    mix, texts, many = mixture(), all_texts(2), 4000
    prompt, mask = some_texts(1)
    wide = tuple(part.expand(len(texts), -1) for part in (prompt, mask))
    with torch.no_grad():
        law = mix.log_prob(mix.nll_of_indices(wide, texts)).exp()
        first = (-mix.nll_of_indices(wide, texts)[:, 0]).exp()
    ids = torch.cat([prompt, prompt[:, :2]], 1).expand(many, -1)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    drawn = MixtureDecoder(mix, 2)(rows, generator())
    counts = (drawn.unsqueeze(1) == texts).all(-1).sum(0)
    assert counts.sum() == many
    floor = torch.multinomial(law, many, True, generator=generator(1)).bincount(minlength=len(texts)) / many
    noise = (floor - law).abs().sum() / 2
    assert (counts / many - law).abs().sum() / 2 < 1.5 * noise
    assert (counts / many - first).abs().sum() / 2 > 2 * noise  # the control: one index alone


def test_a_decoder_says_what_it_does():
    mix = mixture()
    assert MixtureDecoder(mix, 4).name == "index uniform, text sampled"
    assert MixtureDecoder(mixture(1), 4, temperature=0.0).name == "text greedy"
    ids, mask = some_texts(8)
    rows = {"input_ids": torch.cat([ids, ids], 1), "attention_mask": torch.cat([mask, mask], 1)}
    seen = []
    written = MixtureDecoder(mix, 4, temperature=0.0, vocab_size=6)(rows, generator(), seen.append)
    assert torch.equal(seen[-1], written)
    assert written.max() < 6
    ended = (written == EOS).cumsum(-1) > 0
    assert (written[ended] == EOS).all()
    other = rows | {"input_ids": torch.cat([ids, ids.flip(1)], 1)}
    again = MixtureDecoder(mix, 4, temperature=0.0, vocab_size=6)(other, generator())
    assert torch.equal(again, written)  # the response's own ids are not read
