"""Sums and plans collected over batches and ranks, and their figures: likelihood, information, stability.

Legend: B texts, S concept slots, A attributes of the hidden plan.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.clustering import adjusted_mutual_info_score, normalized_mutual_info_score
from torchmetrics.utilities import dim_zero_cat

from models.functional.monitor import plug_in_entropy
from models.functional.plan_information import efficiency, flip_rate, joint_information, shuffled_information
from models.plans.matching import as_numbers, hungarian_accuracy, match_types, swap_locality

SUMS = ("text", "shuffled", "prior", "posterior", "truth", "rebuilt", "any_order", "texts", "tokens")


class PlanMeter(Metric):
    """NLL of texts and plans; concepts, and hidden plans where the corpus knows them.

    types: {name: its slots}; each is matched to one attribute.
    """

    full_state_update = False

    def __init__(self, types: Mapping[str, slice] | None = None) -> None:
        super().__init__()
        self.types = dict(types or {})
        for name in SUMS:
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("concepts", "before", "plans", "donors", "swapped"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        sums: dict[str, Tensor],
        tokens: Tensor,
        concepts: Tensor,
        plans: Tensor | None = None,
        before: Tensor | None = None,
    ) -> None:
        """sums: {name of SUMS: (B,)}; tokens (B,); concepts (B, S); plans (B, A); before (B, S): earlier concepts."""
        for name, values in sums.items():
            setattr(self, name, getattr(self, name) + values.detach().double().sum())
        self.texts += len(concepts)
        self.tokens += tokens.sum()
        self.concepts.append(concepts)
        if plans is not None:
            self.plans.append(plans.to(concepts.device))
        if before is not None:
            self.before.append(before)

    def update_swaps(self, donors: Tensor, swapped: Tensor) -> None:
        """After `update` of the same texts: hidden plans of donors (B, A), and of texts with one type swapped (B, K, A)."""
        self.donors.append(donors)
        self.swapped.append(swapped)

    def compute(self) -> dict[str, float]:
        """Figures by name, {} without texts. Nats a token; rates are bits a text."""
        if self.texts == 0:
            return {}
        nats = {name: float(getattr(self, name)) for name in SUMS}
        texts, tokens, bits = nats["texts"], nats["tokens"], math.log(2) * nats["texts"]
        figures = {
            "nll": nats["text"] / tokens,
            "nll_bound": (nats["text"] + nats["prior"] - nats["posterior"]) / tokens,
            "dnll_shuffle": (nats["shuffled"] - nats["text"]) / tokens,
            "rate_bits": nats["prior"] / bits,
            "posterior_bits": nats["posterior"] / bits,
            "reconstruction": nats["rebuilt"] / texts,
            "tokens_a_text": tokens / texts,
        }
        concepts = dim_zero_cat(self.concepts).cpu()
        figures["concept_bits"] = plug_in_entropy(concepts) / math.log(2)
        if len(self.before) > 0:  # a list, or one tensor once ranks were gathered
            figures["flip_rate"] = flip_rate(dim_zero_cat(self.before).cpu(), concepts)
        if nats["any_order"] > 0:
            figures["nll_any_order"] = nats["any_order"] / tokens
        if nats["truth"] > 0:
            figures["nll_truth"] = nats["truth"] / tokens
            figures["gain_bits"] = (nats["truth"] - nats["text"]) / bits
            figures["efficiency"] = efficiency(nats["truth"], nats["text"], nats["prior"])
        if len(self.plans) > 0:
            plans = dim_zero_cat(self.plans).cpu()
            figures |= _information(concepts, plans)
            if self.types:
                figures |= self._by_type(concepts, plans)
        return figures

    def _by_type(self, concepts: Tensor, plans: Tensor) -> dict[str, float]:
        """NMI and accuracy of each type's attribute, and the locality of swaps where there are some."""
        codes = torch.stack([as_numbers(concepts[:, own]) for own in self.types.values()], -1)
        pairs, shared = match_types(codes, plans)
        names = list(self.types)
        figures = {f"nmi_{names[kind]}": value for (kind, _), value in zip(pairs, shared, strict=True)}
        found = [hungarian_accuracy(codes[:, kind], plans[:, attribute]) for kind, attribute in pairs]
        figures["hungarian_accuracy"] = sum(found) / len(found)
        if len(self.swapped) > 0:
            donors, swapped = dim_zero_cat(self.donors).cpu(), dim_zero_cat(self.swapped).cpu()
            figures["swap_locality"] = swap_locality(plans, donors, swapped, pairs)
        return figures


def _information(concepts: Tensor, plans: Tensor) -> dict[str, float]:
    """Joint information as a share of H(plan), its shuffled control, and slots matched to attributes one to one."""
    shared, of_plan = joint_information(concepts, plans)
    if of_plan == 0:
        return {}
    figures = {
        "joint_information": shared / of_plan,
        "joint_information_shuffled": shuffled_information(concepts, plans)[0] / of_plan,
    }
    for name, score in (("nmi", normalized_mutual_info_score), ("ami", adjusted_mutual_info_score)):
        matched = match_types(concepts, plans, score)[1]
        figures[name] = sum(matched) / len(matched)
    return figures
