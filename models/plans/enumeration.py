r"""Exact likelihoods of texts where all plans can be listed: p(x | u) = sum_z p(z | u) p(x | z).

Legend: N texts, Z plans, S slots, R text columns.
"""

from itertools import product

import torch
from torch import Tensor

from models.functional.one_forward import log_mixture
from models.functional.plan_nll import plan_nll
from models.interfaces.executor import Executor
from models.plans.layout import PlanLayout
from models.plans.planner import Planner
from models.plans.rows import Tokens
from models.plans.vocabulary import END

TOGETHER = 2048  # plans that are scored in one forward pass


def every_plan(layout: PlanLayout, most: int = 256) -> Tensor | None:
    """All plans as choices (Z, S); None where there are more than `most`."""
    size = 1
    for t in layout.vocabulary.types:
        size *= sum(t.codes ** (k * t.levels) for k in range(t.least, t.most + 1))
    if size > most:
        return None
    possible = [row.nonzero().flatten().tolist() for row in layout.vocabulary.possible]
    choices = torch.tensor(list(product(*possible)))
    return torch.unique(choices.masked_fill(~layout.open_slots(choices), END), dim=0)


def log_priors(prior: Planner, prompt: Tokens, plans: Tensor) -> Tensor:
    """log p(z | u) of every plan (Z, S) for every prompt, (N, Z) nats; equal prompts are read once."""
    ids, which = torch.unique(torch.cat(prompt, -1), dim=0, return_inverse=True)
    text, mask = ids.chunk(2, -1)
    is_open, parts = prior.layout.open_slots(plans), []
    few = max(1, TOGETHER // len(plans))
    for first in range(0, len(text), few):
        own = text[first : first + few], mask[first : first + few].bool()
        logits = prior.score_many(*own, plans.expand(len(own[0]), -1, -1))
        parts.append(-plan_nll(logits.log_softmax(-1).flatten(0, 1), *_repeated(len(own[0]), plans, is_open)).sum(-1))
    return torch.cat(parts).view(len(text), -1)[which]


def log_prob_of_texts(prior: Planner, executor: Executor, prompt: Tokens, text: Tensor, plans: Tensor) -> Tensor:
    """log p(x | u) of texts (N, R) in nats, (N,) float64. plans (Z, S): all that have a probability."""
    log_text = -executor.nll_of_pairs(*prior.block(plans), text)
    return log_mixture(log_priors(prior, prompt, plans), log_text)


def _repeated(rows: int, *parts: Tensor) -> list[Tensor]:
    return [part.repeat(rows, 1) for part in parts]
