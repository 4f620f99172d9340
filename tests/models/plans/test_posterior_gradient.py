"""What the posterior's gradient counts is what autograd gives for the text's loss alone, whatever other losses there are."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import BASE, generator, some_texts
from torch.testing import assert_close

from models.functional.bits_per_byte import token_nll
from models.plans.executor import AutoregressiveExecutor
from models.plans.planner import Coder, Planner, relaxed
from models.plans.posterior_gradient import PosteriorGradient
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

TYPES = {"a": {"codes": 4, "most": 2}, "b": {"codes": 6}}


@pytest.mark.parametrize("sampler", ["gumbel_st", "fsq", "ema_vq"])
def test_it_is_that_of_the_text_and_no_other_loss(sampler):
    torch.manual_seed(0)
    model = UnifiedModel(tiny_causal(BASE), ConceptVocabulary(TYPES, BASE), sampler).double()
    posterior, watched = Planner(model, "slots", model.quantiser), PosteriorGradient()
    text = some_texts(5)
    plan = posterior.draw(*text, relaxed(generator(), 1.0) if model.quantiser is None else Coder(model.quantiser, 0.3))
    nll = token_nll(AutoregressiveExecutor(model).logits(plan.ids, plan.embeds, text[0]), text[0]).mean()
    (by_autograd,) = torch.autograd.grad(nll, plan.rounds[0].states, retain_graph=True)
    watched.watch_plan(plan)
    others = plan.logits.logsumexp(-1).mean() + (plan.soft_embeds - plan.hard_embeds).square().mean()
    (nll + others).backward()
    assert_close(watched.take().double(), by_autograd.flatten(1).norm(dim=1).sum(), rtol=1e-5, atol=0.0)
    assert watched.take() is None


def test_backward_passes_of_one_step_add_up_and_a_plan_without_a_gradient_counts_nothing():
    watched, states = PosteriorGradient(), torch.zeros(2, 1, 2, requires_grad=True)
    assert watched.take() is None
    watched.watch_states(states.detach())
    assert watched.take() is None
    watched.watch_states(read := states * 1.0)
    assert watched.take() == 0
    for _ in range(2):
        watched.watch_states(read := states * 1.0)
        (read * torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])).sum().backward()
    assert watched.take() == 12
