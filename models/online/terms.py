"""Auxiliary loss terms of commits and codes by name, unweighted, and their monitors.

Legend: B batch, T positions, M packed concepts, K codes.
"""

import torch
from torch import Generator, Tensor

from models.functional.commit_rate import ratio_loss
from models.functional.next_token import CausalText
from models.functional.usage import usage_kl
from models.online.concept_stack import Level
from models.online.growth import SurpriseRouter
from models.online.model import OnlineConceptModel
from models.online.options import TERMS


def online_terms(
    model: OnlineConceptModel, levels: list[Level], text: CausalText, generator: Generator | None = None
) -> dict[str, Tensor]:
    """Sums over levels of every term but `text`.

    ratio: `ratio_loss` of learned routers, 0 at compression 1. code: squared distance of codes to their hidden states.
    usage: KL of the mean code distribution to uniform. draft: nats per token of the predictions that growth `entropy` and
    `draft` read.
    generator: of the draws of `draft`.
    """
    zero = levels[0].hidden.new_zeros(())
    terms = dict.fromkeys(TERMS[1:], zero)
    for stack, level in zip(model.stacks(), levels, strict=True):
        routing, real = level.routing, level.real
        if routing.compression > 1 and stack.router.learned:
            parts = (routing.commit, routing.probability, routing.valid, routing.compression)
            terms["ratio"] = terms["ratio"] + ratio_loss(*parts)
        terms["code"] = terms["code"] + (level.coded.error * real).sum() / real.sum().clamp(min=1)
        terms["usage"] = terms["usage"] + usage_kl(level.coded.probabilities[real])
        if isinstance(stack.router, SurpriseRouter):
            terms["draft"] = terms["draft"] + stack.router.draft_nll(level.hidden, text, generator)
    return terms


@torch.no_grad()
def online_monitors(levels: list[Level]) -> dict[str, Tensor]:
    """Of each level: realised compression, mean commit probability, number of codes in use."""
    found = {}
    for k, level in enumerate(levels):
        ending = f"_{k + 1}" if k else ""
        routing = level.routing
        found[f"compression{ending}"] = 1 / routing.realised.clamp(min=1e-6)
        found[f"commit_probability{ending}"] = routing.probability[routing.valid].mean()
        found[f"codes_in_use{ending}"] = level.coded.ids[level.real].unique().numel() + torch.zeros(())
    return found
