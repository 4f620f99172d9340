"""The losses of a plan, each as one raw scalar: NLL under the prior, rate, commitment, usage, ends and quota.

Legend: B batch, S slots, W choices of a slot, R response tokens.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from models.functional.commitment import commitment, relaxation_cosine
from models.functional.plan_length import eos_loss, expected_length, quota_loss
from models.functional.plan_nll import free_bits, plan_nll, slot_kl
from models.functional.usage import code_perplexity, usage_kl
from models.plans.planner import Plan
from models.plans.vocabulary import END, ConceptVocabulary

NAMES = ("text", "planner", "rate", "commitment", "usage", "eos", "quota", "bag", "posterior", "signals")


def plan_terms(
    plan: Plan,
    prior_logits: Tensor,
    vocabulary: ConceptVocabulary,
    *,
    tokens: float | Tensor,
    floor: float,
    quota: float | None,
    multiplier: float = 0.0,
    signal_types: Collection[str] = (),
) -> dict[str, Tensor]:
    """Raw scalars by name. plan: drawn from the posterior; prior_logits (B, S, W) of the same choices.

    planner: -log p(z | u), nats a token of text (tokens: mean of a text); choices are constants, so that only the prior gets a
    gradient.
    rate: KL(q || p), each slot at least `floor` nats, a token of text; the prior is a constant, so that only the posterior gets
    a gradient. commitment: as `commitment`. usage: KL to uniform of the mean of each type's codes at each level, averaged over
    these; not over the `signal_types`, whose codes are as frequent as the values of their signal. eos: nats a type that may end
    early. quota: (mean concepts a text - quota)², and multiplier * (mean - quota); 0 without one.
    Monitors: entropy of a choice (nats), relaxation's cosine, mean concepts a text, and the perplexity of codes.
    """
    is_open = plan.open_slots
    log_q, log_p = plan.logits.log_softmax(-1), prior_logits.log_softmax(-1)
    kl = slot_kl(log_q, log_p.detach(), is_open).mean(0)  # (S,)
    usage, used, ends = [], [], []
    for t, levels in zip(vocabulary.types, vocabulary.level_slots, strict=True):
        for own in levels:
            probabilities = log_q[:, own].exp()
            codes = probabilities[..., 1 : 1 + t.codes].flatten(0, 1)
            if t.name not in signal_types:
                usage.append(usage_kl(codes, is_open[:, own].flatten().to(codes.dtype)))
            used.append(code_perplexity(codes.detach()))
            if t.least < t.most:
                ends.append(eos_loss(probabilities[..., END].masked_fill(~is_open[:, own], 1.0)).mean())
    none = kl.new_zeros(())
    lengths = sum((expected_length(plan.stops[:, levels[0]]) for levels in vocabulary.level_slots), none)
    soft, hard = plan.soft_embeds[is_open], plan.hard_embeds[is_open]
    return {
        "planner": plan_nll(log_p, plan.choices, is_open).sum(-1).mean() / tokens,
        "rate": free_bits(kl, floor).sum() / tokens,
        "commitment": commitment(soft, hard),
        "usage": torch.stack(usage).mean() if usage else none,
        "eos": torch.stack(ends).mean() if ends else none,
        "quota": none if quota is None else quota_loss(lengths, quota, multiplier),
        "entropy": -(log_q.exp() * log_q).sum(-1)[is_open].detach().mean(),
        "cosine": relaxation_cosine(soft, hard).detach(),
        "concepts": lengths.detach().mean(),
        "code_perplexity": torch.stack(used).mean(),
    }
