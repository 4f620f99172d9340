"""LLaDA bodies with fresh weights."""

from functools import partial

import pytest
import torch
from helpers.llada import build_small

from models.backbones.causal import build_body
from models.backbones.llada import build_llada
from models.functional.errors import UsageError


def test_build_llada():
    model = build_small(num_key_value_heads=2, tie_word_embeddings=True)
    assert model(torch.tensor([[1, 19, 2]])).shape == (1, 3, 20)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads == 2
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    torch.manual_seed(3)
    first = build_small().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(weight, first[name]) for name, weight in build_small().state_dict().items())


@pytest.mark.parametrize("spread", [0.02, 0.25])
def test_the_spread_of_fresh_weights(spread):
    """Of a LLaDA, and of a body that an objective turns both ways: 1 / sqrt(16) is what a width of 16 wants."""
    both_ways = partial(build_body, attention="bidirectional")
    for build in (build_llada, both_ways):
        model = build_small(build, initializer_range=spread)
        for weight in (model.embedding, model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
            assert weight.std().item() == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 18}, r"model\.hidden_size=18 .*multiple of 8, such as model\.hidden_size=24"),
        ({"hidden_size": 12}, r"model\.hidden_size=12 .*even width"),
        ({"num_key_value_heads": 3}, r"model\.num_key_value_heads=3 does not divide"),
        ({"num_hidden_layers": 0}, r"model\.num_hidden_layers=0 has to be above 0"),
        ({"rope_theta": -1.0}, r"model\.rope_theta=-1\.0"),
        ({"mask_token_id": 20}, r"model\.mask_token_id=20 is outside the vocabulary; type an id from 0 to 19"),
        ({"neighbour_heads": 5}, r"model\.neighbour_heads=5 must lie between 0 and the 4 key-value heads"),
        ({"mask_token_id": 18}, r"model\.mask_token_id=18 is also the end or padding token"),
    ],
)
def test_build_refusals(changes, message):
    with pytest.raises(UsageError, match=message):
        build_small(**changes)
