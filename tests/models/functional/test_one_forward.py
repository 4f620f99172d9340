"""One-forward texts against enumeration: what is hidden, what is redrawn, mixtures over plans, total correlation."""

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from models.functional.next_token import until_end
from models.functional.one_forward import (
    hidden_tokens,
    least_certain,
    log_mixture,
    nll_of_texts,
    responsibilities,
    token_entropy,
    total_correlation_given,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_half_the_rows_are_hidden_whole_and_the_others_by_any_number_alike():
    counted = torch.ones(40_000, 4, dtype=torch.bool)
    counted[:, 3] = False
    hidden = hidden_tokens(counted, 0.5, generator())
    assert not (hidden & ~counted).any()
    share = hidden.sum(-1).bincount(minlength=4) / len(hidden)
    assert_close(share, torch.tensor([0.0, 1 / 6, 1 / 6, 2 / 3]), atol=0.01, rtol=0)
    one = hidden[hidden.sum(-1) == 1].double().mean(0)
    assert_close(one, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]).double(), atol=0.02, rtol=0)
    assert torch.equal(hidden_tokens(counted, 1.0, generator()), counted)
    never = hidden_tokens(counted, 0.0, generator()).sum(-1).bincount(minlength=4) / len(hidden)
    assert_close(never, torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]), atol=0.01, rtol=0)


def test_the_least_certain_tokens_by_hand():
    entropies = torch.tensor([[0.5, 0.1, 0.9, 0.3, 2.0], [0.0, 0.0, 0.7, 0.0005, 0.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    counted = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    found = least_certain(entropies, counted, 0.5)
    # the last column does not count; of the second row only one token is unsure
    expected = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(found, expected)
    assert torch.equal(least_certain(entropies, counted, 0.1).sum(-1), torch.tensor([1, 1, 0]))  # rounded up
    assert torch.equal(least_certain(entropies, counted, 1.0)[0], counted[0])
    assert not least_certain(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 1.0).any()


def test_entropy_of_tokens():
    logits = torch.tensor([[0.0, 0.0, -1e9], [5.0, -1e9, -1e9]])
    assert_close(token_entropy(logits), torch.tensor([math.log(2), 0.0]))


def test_the_mixture_is_the_sum_of_probabilities():
    prior = torch.rand(3, 5, generator=generator(), dtype=torch.float64)
    given = torch.rand(3, 5, generator=generator(1), dtype=torch.float64)
    assert_close(log_mixture(prior.log(), given.log()).exp(), (prior * given).sum(-1))


def test_the_nll_of_every_text_given_every_plan_by_hand():
    log_p = torch.randn(2, 3, 4, generator=generator()).double().log_softmax(-1)
    texts, counted = torch.tensor([[1, 3, 0], [2, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    found = nll_of_texts(log_p, texts, counted)
    for plan in range(2):
        assert float(found[0, plan]) == pytest.approx(-float(log_p[plan, 0, 1] + log_p[plan, 1, 3] + log_p[plan, 2, 0]))
        assert float(found[1, plan]) == pytest.approx(-float(log_p[plan, 0, 2] + log_p[plan, 1, 0]))


def test_responsibilities_are_bayes_rule():
    prior, text = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.1, 0.4, 0.0001]])
    joint = prior * text
    assert_close(responsibilities(prior.log(), text.log()), (joint / joint.sum()).double(), atol=1e-6, rtol=0)


def test_total_correlation_given_a_code_by_enumeration():
    """Against the divergence from the truth to the product of the true marginals, code by code."""
    texts = torch.tensor(list(product(range(3), range(2), range(2))))
    p = torch.rand(len(texts), generator=generator(), dtype=torch.float64)
    p = p / p.sum()
    codes = torch.randint(0, 3, (len(texts),), generator=generator(2))
    expected = 0.0
    for code in codes.unique():
        own, weight = texts[codes == code], p[codes == code]
        total, weight = weight.sum(), weight / weight.sum()
        for text, chance in zip(own, weight, strict=True):
            apart = math.prod(float(weight[own[:, place] == text[place]].sum()) for place in range(3))
            expected += float(total * chance) * math.log(float(chance) / apart)
    assert expected > 0.05
    assert total_correlation_given(texts, p, codes) == pytest.approx(expected)
    # a code that tells the whole text leaves nothing; texts of independent tokens have none either
    assert total_correlation_given(texts, p, torch.arange(len(texts))) == pytest.approx(0, abs=1e-12)
    chances = [torch.rand(n, generator=generator(n), dtype=torch.float64) for n in (3, 2, 4)]
    free = torch.tensor(list(product(range(3), range(2), range(4))))
    flat = torch.stack([chances[place][free[:, place]] for place in range(3)]).prod(0)
    assert total_correlation_given(free, flat, torch.zeros(len(free), dtype=torch.long)) == pytest.approx(0, abs=1e-12)


def test_columns_after_the_end_of_a_text_are_no_part_of_what_one_forward_pass_loses():
    """Against the best law q(x) = prod_{l <= e} q_l(x_l), whose q_l is the truth's among the texts that have not ended."""
    # token 0 ends a text and fills what is beyond
    texts = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0], [1, 1, 0], [1, 2, 0], [2, 2, 0], [2, 1, 0]])
    p = torch.rand(len(texts), generator=generator(), dtype=torch.float64)
    p, counted = p / p.sum(), until_end(texts, 0)
    expected = 0.0
    for text, chance, own in zip(texts, p, counted, strict=True):
        best = 1.0
        for place in range(int(own.sum())):
            alive = counted[:, place]
            best *= float(p[alive & (texts[:, place] == text[place])].sum() / p[alive].sum())
        expected += float(chance) * math.log(float(chance) / best)
    none = torch.zeros(len(texts), dtype=torch.long)
    assert total_correlation_given(texts, p, none, counted) == pytest.approx(expected)
    assert total_correlation_given(texts, p, none) > expected + 0.05
    two = torch.tensor([[0, 0, 0], [1, 1, 0]])  # an end, or two words: one forward pass writes both laws exactly
    half = torch.tensor([0.5, 0.5])
    assert total_correlation_given(two, half, none[:2], until_end(two, 0)) == pytest.approx(0, abs=1e-12)


def test_a_share_of_tokens_is_rounded_up_from_its_exact_value():
    for hundredths in range(1, 101):
        for size in (7, 50, 99, 100):
            entropies = torch.ones(1, size)
            found = least_certain(entropies, torch.ones(1, size, dtype=torch.bool), hundredths / 100)
            assert int(found.sum()) == -(-hundredths * size // 100)
