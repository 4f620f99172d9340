"""Scores generated texts against the truth of an oracle corpus."""

import math

import torch
from torch import Tensor

from datamodules.oracle.distribution import OracleDistribution
from datamodules.score import Score, proportion
from models.functional.monitor import plug_in_entropy

KINDS = ("all", "part", "none")


def prompt_kind(reveal: Tensor) -> Tensor:
    """Index into KINDS for each row: does the prompt reveal all of the plan, part of it or none? (N, A) -> (N,)"""
    known = (reveal >= 0).sum(-1)
    return torch.where(known == reveal.shape[-1], 0, torch.where(known > 0, 1, 2))


def total_variation(samples: Tensor, log_prob: Tensor) -> float:
    """Plug-in TV = sum of (frequency - p) over the texts seen more often than their probability; samples (N, R), (N,).

    Biased upward by the sampling noise that the resampling floor shows.
    """
    _, inverse, counts = torch.unique(samples, dim=0, return_inverse=True, return_counts=True)
    probability = torch.zeros(len(counts), dtype=torch.float64).scatter(0, inverse, log_prob.exp())
    return float((counts / len(samples) - probability).clamp(min=0).sum())


class OracleScorer:
    """Validity, exact NLL of the valid texts, exact match where determined, coverage, TV and entropy.

    quality:
      validity (and validity_all, _part, _none by what the prompt reveals): share of texts with p(text | prompt) > 0.
      exact_nll: mean -log p(text | prompt) of the valid texts, nats; exact_nll_truth is that of texts sampled from the truth
        at the same prompts, H(text | prompt). A decoder that is valid only where the prompt shows the whole plan has easy
        rows, and both figures small: compare the two, not figures of different decoders.
      exact_match: over prompts that reveal the whole plan, texts right at every position that the plan determines. None where
        several templates leave the positions themselves open.
      coverage: probability of the plans of the valid unprompted texts (1 = every plan seen).
      tv: total variation of the unprompted texts from the truth (plug-in); entropy_truth: H(text), nats.
      style: with `style_words` (first ones, other ones), the share of first words among them.
    """

    def __init__(self, distribution: OracleDistribution, style_words: tuple[Tensor, Tensor] | None = None) -> None:
        self.distribution, self.style_words = distribution, style_words

    def __call__(self, rows: dict[str, Tensor], responses: Tensor) -> Score:
        reveal, responses = rows["reveal"].cpu(), responses.cpu()
        log_prob = self.distribution.log_prob(responses, reveal)
        valid, kinds = log_prob.isfinite(), prompt_kind(reveal)
        quality: dict[str, float | None] = {}
        ci95: dict[str, tuple[float, float]] = {}

        def put(name: str, hits: Tensor) -> None:
            quality[name], interval = proportion(hits)
            if interval is not None:
                ci95[name] = interval

        put("validity", valid)
        for k, kind in enumerate(KINDS):
            put(f"validity_{kind}", valid[kinds == k])
        nll = -log_prob[valid]
        quality["exact_nll"] = nll.mean().item() if len(nll) else None
        quality["exact_nll_truth"] = self.distribution.entropy(reveal[valid]).mean().item() if len(nll) else None
        if len(nll) > 1:
            half = 1.96 * nll.std().item() / math.sqrt(len(nll))
            ci95["exact_nll"] = (nll.mean().item() - half, nll.mean().item() + half)
        if self.style_words is not None:
            first, other = (torch.isin(responses, words) for words in self.style_words)
            put("style", first[first | other])
        if len(self.distribution.grammar.templates) == 1:
            put("exact_match", self._matches(responses[kinds == 0], reveal[kinds == 0]))
        else:
            quality["exact_match"] = None

        unprompted = kinds == 2
        texts, entropy, distinct = responses[unprompted], None, None
        quality |= {"coverage": None, "tv": None, "entropy_truth": None}
        if len(texts):
            entropy, distinct = plug_in_entropy(texts), len(torch.unique(texts, dim=0)) / len(texts)
            quality["coverage"] = self._coverage(texts)
            quality["tv"] = total_variation(texts, log_prob[unprompted])
            quality["entropy_truth"] = self.distribution.entropy(reveal[unprompted][:1]).item()
        return Score(quality, entropy, distinct, ci95)

    def _matches(self, responses: Tensor, reveal: Tensor) -> Tensor:
        """(N,) bool: right at every position that has one possible word given the prompt."""
        if len(responses) == 0:
            return torch.zeros(0, dtype=torch.bool)
        best, word = self.distribution.marginals(reveal).max(-1)
        return ((responses == word) | (best < 1 - 1e-9)).all(-1)

    def _coverage(self, texts: Tensor) -> float:
        plans = torch.unique(self.distribution.plans_of(texts), dim=0)
        plans = plans[(plans >= -1).all(-1)]
        total = torch.ones(len(plans), dtype=torch.float64)
        for a, prior in enumerate(self.distribution.prior):
            total = total * torch.where(plans[:, a] >= 0, prior[plans[:, a].clamp(min=0)], 1.0)
        return float(total.sum())
