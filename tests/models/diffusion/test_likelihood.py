"""The bound of a masked model against the enumeration of all masks, and greedy filling token by token."""

import itertools
import math

import pytest
import torch
from helpers.causal import ToyFiller
from torch import Generator

from models.backbones.bidirectional import fill_nll
from models.diffusion.likelihood import fills_greedily, response_nll_draws

PROMPT, TEXT = [3, 5], [4, 6, 3]


def row_of(prompt: list[int], text: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([prompt + text])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "response_mask": torch.arange(len(ids[0])).expand(1, -1) >= len(prompt),
    }


def enumerated_bound(model, row) -> float:
    """The bound of a row, nats: every number of hidden tokens and every choice of them is equally likely."""
    places = row["response_mask"][0].nonzero()[:, 0].tolist()
    total = 0.0
    for count in range(1, len(places) + 1):
        choices = list(itertools.combinations(places, count))
        for chosen in choices:
            hidden = torch.zeros_like(row["response_mask"])
            hidden[0, list(chosen)] = True
            xt = torch.where(hidden, model.mask_id, row["input_ids"])
            nll = fill_nll(model, xt, row["input_ids"], hidden, row["attention_mask"])
            total += len(places) / count * float(nll.sum()) / len(choices) / len(places)
    return total


@pytest.mark.parametrize("text", [TEXT, [4], [3, 3, 4, 6]])
@torch.no_grad()
def test_the_mean_of_the_draws_is_the_enumerated_bound(text):
    model, row = ToyFiller(), row_of(PROMPT, text)
    draws = response_nll_draws(model, row, Generator().manual_seed(0), samples=6000, batch_size=500)
    error = max(float(draws.std()) / math.sqrt(len(draws)), 1e-9)
    bound = enumerated_bound(model, row)
    assert abs(float(draws.mean()) - bound) < 4 * error
    if len(text) > 1:
        # equal shares of the draws hide 1, 2, ... tokens: without the weight R / l their mean is another number
        hidden = 1 + torch.arange(len(draws)) * len(text) // len(draws)
        assert abs(float((draws * hidden / len(text)).mean()) - bound) > 4 * error


@torch.no_grad()
def test_the_bound_of_all_texts_is_that_of_a_distribution(tiny_llada):
    """exp(-bound) is at most the probability, and probabilities of all texts sum to 1."""
    model = tiny_llada(vocab_size=5)
    rows = [row_of([3], list(text)) for text in itertools.product([0, 1, 3, 4], repeat=2)]
    assert sum(math.exp(-enumerated_bound(model, row)) for row in rows) < 1


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_draws_are_the_same_in_batches_of_any_size(tiny_llada, guidance):
    model, row = tiny_llada(), row_of(PROMPT, TEXT)
    found = [
        response_nll_draws(model, row, Generator().manual_seed(1), samples=7, batch_size=size, guidance=guidance)
        for size in (1, 3, 7)
    ]
    assert len(found[0]) == 7
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_guidance_changes_the_bound(tiny_llada):
    model, row = tiny_llada(), row_of(PROMPT, TEXT)
    plain, guided = (
        response_nll_draws(model, row, Generator().manual_seed(1), samples=4, guidance=w) for w in (0.0, 1.0)
    )
    assert not torch.allclose(plain, guided)


@torch.no_grad()
def test_greedy_filling_takes_the_most_certain_token_first(tiny_llada):
    model = tiny_llada()
    row = row_of(PROMPT, TEXT)
    xt = torch.where(row["response_mask"], model.mask_id, row["input_ids"])
    for _ in TEXT:
        p = model(xt).softmax(-1)
        p[..., model.mask_id] = 0.0
        best = torch.where(xt == model.mask_id, p.amax(-1), -1.0).argmax()
        xt[0, best] = p[0, best].argmax()
    filled = xt[0, 2:].tolist()
    assert fills_greedily(model, row_of(PROMPT, filled))
    assert not fills_greedily(model, row_of(PROMPT, [*filled[:-1], filled[-1] % 3 + 3 if filled[-1] != 3 else 4]))
