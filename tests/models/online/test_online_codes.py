"""Codes that are points of a space: the same equalities as for a table, gradients by hand."""

import pytest
import torch
from helpers.online import HALF, naive_logits, texts, tiny_online
from scipy.stats import chisquare
from torch.testing import assert_close

from models.online.codes import build_codes
from models.online.concept_stack import CompressionSettings
from models.online.decoder import IncrementalForward

SPACES = ["fsq", "ema_vq"]


def online(sampler: str, **options):
    model = tiny_online(sampler=sampler, **options)
    for stack in model.stacks():
        if stack.codes.space.moving:  # before training they all lie at 0
            torch.nn.init.normal_(stack.codes.space.codes)
    return model


@pytest.mark.parametrize("sampler", SPACES)
@pytest.mark.parametrize("growth", ["null", "fixed"])
def test_one_forward_is_one_forward_a_position_and_one_step(sampler, growth):
    model, ids = online(sampler, growth=growth, gate="none"), texts()
    states, levels = model.read(ids, settings=HALF)
    assert len(levels[0].coded.ids[levels[0].real].unique()) > 1
    logits = model.logits(states)
    assert_close(logits, torch.stack([naive_logits(model, row, HALF) for row in ids]), atol=1e-12, rtol=1e-12)
    forward = IncrementalForward(model)
    steps = [forward.prefill(ids[:, :2])] + [forward.step(ids[:, t]) for t in range(2, ids.shape[1])]
    with torch.no_grad():
        assert_close(torch.stack(steps, 1), model(ids)[:, 1:], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("sampler", SPACES)
def test_without_compression_it_is_the_backbone(sampler):
    model, ids = online(sampler), texts()
    every = CompressionSettings(compression=1.0, quantisation=0.0)
    for training in (True, False):
        ours = model.train(training).logits(model.read(ids, settings=every)[0])
        assert torch.equal(ours, model.backbone(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("sampler", SPACES)
def test_the_gradient_is_that_of_the_point(sampler):
    """By hand: (1 - a) of the state's own, a of the embedding of a point that nothing had rounded."""
    codes = online(sampler).stack.codes
    hidden, pull = (torch.randn(2, 3, 16, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    sure = torch.full((2, 3), 0.7, dtype=torch.float64, requires_grad=True)
    unrounded = codes.space.to_embedding(codes.space.point(codes.normed(hidden)))
    (by_hand,) = torch.autograd.grad(((0.6 * hidden + 0.4 * unrounded) * pull).sum(), hidden)
    coded = codes(hidden, sure, quantisation=0.4)
    (found,) = torch.autograd.grad((coded.embeds * pull).sum(), hidden)
    assert_close(found, by_hand)
    # the code itself is what is read, and NULL's share reaches the decision to commit
    whole = codes(hidden, sure, quantisation=1.0, null_mass=True)
    assert_close(whole.embeds, codes.space.to_embedding(codes.space.codes[whole.ids]))
    (found,) = torch.autograd.grad((whole.embeds * pull).sum(), sure)
    assert_close(found, (whole.embeds * pull).sum(-1))
    assert_close(codes(hidden, sure, quantisation=1.0).embeds, whole.embeds)


def test_points_of_a_space_have_equal_weight_beside_null():
    codes = build_codes("fsq", 16, 8)
    assert_close(codes.log_mass(torch.randn(5, 16)), torch.full((5,), 8.0).log())
    assert build_codes("gumbel_st", 16, 8).log_mass(torch.randn(5, 16)).std() > 0.1


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_drawn_codes_have_the_distribution_of_their_logits_over_the_noise(noise):
    """argmax(logits + noise g) with Gumbel g is a draw from softmax(logits / noise); without noise the most probable code."""
    codes, n = build_codes("gumbel_st", 16, 5), 20_000
    state = 0.3 * torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(codes.head.weight, std=0.2)
    options = {"quantisation": 1.0, "noise": noise, "generator": torch.Generator().manual_seed(0)}
    with torch.no_grad():
        drawn = codes(state.expand(1, n, -1), torch.ones(1, n), **options).ids.flatten()
        logits = codes.logits(state)[0, 0]
        assert codes(state, torch.ones(1, 1), quantisation=1.0).ids.item() == logits.argmax()
    expected = n * (logits / noise).softmax(-1)
    counts, expected = drawn.bincount(minlength=5).numpy(), expected.double().numpy()
    assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("sampler", ["gumbel_st", "fsq", "ema_vq"])
def test_the_distance_of_a_code_pulls_the_code_alone(sampler):
    """The state that it is measured to is a constant: it gets a gradient only through the choice of the code."""
    torch.manual_seed(0)
    codes = build_codes(sampler, 6, 8, 0.5, dtype=torch.float64)
    if sampler == "ema_vq":
        torch.nn.init.normal_(codes.space.codes)
    codes.double()
    hidden, ones = torch.randn(3, 4, 6, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    gradients = []
    for detached in (True, False):
        own = hidden.clone().requires_grad_()
        coded = codes(own, ones, quantisation=1.0)
        to = hidden if detached else own
        by_hand = (coded.embeds - to).square().mean(-1) / hidden.square().mean(-1)
        assert_close(by_hand, coded.error)
        gradients.append(
            [torch.autograd.grad(part.sum(), own, retain_graph=True)[0] for part in (coded.error, by_hand)]
        )
    assert_close(*gradients[0])
    assert (gradients[1][0] - gradients[1][1]).abs().max() > 1e-3
