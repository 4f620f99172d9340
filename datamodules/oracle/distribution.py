r"""Exact probabilities of an oracle corpus, by summing the hidden plan out.

A template's slots depend on one attribute each, so given a template the sum over plans factorises:

.. math:: p(x \mid c) = \sum_{\tau} p(\tau) \prod_{a} \sum_{k} p(a = k \mid c)\, [k \text{ fits } \tau]
          \prod_{l: a(l) = a} p(x_l \mid k)

which is fast at any number of plans.
Legend: N texts, R tokens of a text, V vocabulary, A attributes, K values of an attribute, c what the prompt reveals.
"""

from itertools import product

import torch
from torch import Generator, Tensor

from datamodules.oracle.grammar import Grammar, Template
from models.functional.plan_information import entropy


class OracleDistribution:
    """p(x), p(x | c), entropies, marginals and samples. `reveal` (N, A) int64: an attribute's value, or -1 for hidden."""

    def __init__(self, grammar: Grammar, word_id: dict[str, int], vocab_size: int, length: int, eos_id: int) -> None:
        self.grammar, self.word_id, self.vocab_size = grammar, word_id, vocab_size
        self.length, self.eos_id = length, eos_id
        self.index = {a.name: k for k, a in enumerate(grammar.attributes)}
        self.prior = [_normalised(a.prior) for a in grammar.attributes]
        self.template_prior = torch.tensor([t.weight for t in grammar.templates], dtype=torch.float64)
        self.allowed = [[self._allowed(t, a.name) for a in grammar.attributes] for t in grammar.templates]
        self.emission = [[self._emission(s.words) for s in t.slots] for t in grammar.templates]
        self._check()

    # -- what the prompt leaves open --------------------------------------------------------------------------------

    def posterior(self, reveal: Tensor) -> list[Tensor]:
        """p(a = k | c) of every attribute: A tensors (N, K)."""
        tables = []
        for a, prior in enumerate(self.prior):
            known = torch.nn.functional.one_hot(reveal[:, a].clamp(min=0), len(prior)).double()
            tables.append(torch.where(reveal[:, a : a + 1] >= 0, known, prior.expand(len(reveal), -1)))
        return tables

    def template_posterior(self, reveal: Tensor) -> Tensor:
        """p(template | c), (N, templates)."""
        tables = self.posterior(reveal)
        fits = []
        for tau, weight in enumerate(self.template_prior):
            mass = weight.expand(len(reveal)).clone()
            for a, table in enumerate(tables):
                mass = mass * (table * self.allowed[tau][a]).sum(-1)
            fits.append(mass)
        return torch.stack(fits, -1)

    # -- probabilities ----------------------------------------------------------------------------------------------

    def log_prob(self, texts: Tensor, reveal: Tensor) -> Tensor:
        """log p(x | c) in nats, -inf for a text without probability. texts (N, R), reveal (N, A) -> (N,) float64."""
        log_tables = [table.log() for table in self.posterior(reveal)]
        terms = []
        for tau, template in enumerate(self.grammar.templates):
            scores = [table + allowed.log() for table, allowed in zip(log_tables, self.allowed[tau], strict=True)]
            total = self.template_prior[tau].log().expand(len(texts)).clone()
            for position, slot in enumerate(template.slots):
                log_p = self.emission[tau][position].log()[:, texts[:, position]].T  # (N, K)
                if slot.attribute is None:
                    total = total + log_p[:, 0]
                else:
                    scores[self.index[slot.attribute]] = scores[self.index[slot.attribute]] + log_p
            total = total + sum(torch.logsumexp(score, -1) for score in scores)
            ended = (texts[:, len(template.slots) :] == self.eos_id).all(-1)
            terms.append(torch.where(ended, total, -torch.inf))
        return torch.logsumexp(torch.stack(terms), 0)

    def marginals(self, reveal: Tensor) -> Tensor:
        """p(x_l | c) of every position, (N, R, V) float64."""
        template, within = self.template_posterior(reveal), self._within(reveal)
        out = torch.zeros(len(reveal), self.length, self.vocab_size, dtype=torch.float64)
        for tau, shape in enumerate(self.grammar.templates):
            weight = template[:, tau : tau + 1]
            for position, slot in enumerate(shape.slots):
                emission = self.emission[tau][position]
                if slot.attribute is None:
                    out[:, position] += weight * emission[0]
                else:
                    out[:, position] += weight * (within[tau][self.index[slot.attribute]] @ emission)
            out[:, len(shape.slots) :, self.eos_id] += weight
        return out

    def seen_marginals(self, evidence: Tensor, reveal: Tensor) -> Tensor:
        """p(x_l | c, y) of every position, where y holds evidence of each word on its own.

        evidence (N, R, V): log p(y_l | x_l), up to a constant of the position; all 0 gives `marginals`. (N, R, V) float64.
        """
        evidence, log_tables = evidence.double(), [table.log() for table in self.posterior(reveal)]
        masses, inside = [], []
        for tau, shape in enumerate(self.grammar.templates):
            # 1. evidence of every position for its attribute, by the few words of each value: log p(y_l | a = k)
            few_words = [self._few_words(tau, position) for position in range(len(shape.slots))]
            joint = [
                p.log() + evidence[:, position][:, word] for position, (p, word) in enumerate(few_words)
            ]  # (N, K, W)
            support = [torch.logsumexp(words, -1) for words in joint]
            scores = [table + allowed.log() for table, allowed in zip(log_tables, self.allowed[tau], strict=True)]
            mass = self.template_prior[tau].log() + evidence[:, len(shape.slots) :, self.eos_id].sum(-1)
            for slot, one in zip(shape.slots, support, strict=True):
                if slot.attribute is None:
                    mass = mass + one[:, 0]
                else:
                    scores[self.index[slot.attribute]] = scores[self.index[slot.attribute]] + one
            masses.append(mass + sum(torch.logsumexp(score, -1) for score in scores))
            # 2. the words of every position, given the evidence of all positions
            marginals = torch.zeros(len(reveal), self.length, self.vocab_size, dtype=torch.float64)
            marginals[:, len(shape.slots) :, self.eos_id] = 1
            for position, slot in enumerate(shape.slots):
                value = torch.ones_like(support[position])
                if slot.attribute is not None:  # a template that the prompt rules out has no value: its mass is 0
                    value = torch.softmax(scores[self.index[slot.attribute]], -1).nan_to_num()
                words = few_words[position][1].flatten().expand(len(reveal), -1)
                within = torch.softmax(joint[position], -1)  # (N, K, W)
                marginals[:, position].scatter_add_(1, words, (value.unsqueeze(-1) * within).flatten(1))
            inside.append(marginals)
        template = torch.softmax(torch.stack(masses, -1), -1)  # (N, templates)
        return torch.einsum("nt,tnlv->nlv", template, torch.stack(inside))

    def entropy(self, reveal: Tensor) -> Tensor:
        """H(x | c) in nats for each row of reveal, (N,). Exact because a text determines its template and the values in it."""
        template, within = self.template_posterior(reveal), self._within(reveal)
        total = entropy(template)
        for tau, shape in enumerate(self.grammar.templates):
            inside = torch.zeros(len(reveal), dtype=torch.float64)
            for a in {self.index[s.attribute] for s in shape.slots if s.attribute is not None}:
                inside += entropy(within[tau][a])
            for position, slot in enumerate(shape.slots):
                noise = entropy(self.emission[tau][position])  # (K,)
                a = None if slot.attribute is None else self.index[slot.attribute]
                inside += noise[0] if a is None else within[tau][a] @ noise
            total = total + template[:, tau] * inside
        return total

    def total_correlation(self, reveal: Tensor) -> Tensor:
        """TC(x | c) = sum_l H(x_l | c) - H(x | c) in nats, (N,): the least KL from the truth to any product over positions."""
        return entropy(self.marginals(reveal)).sum(-1) - self.entropy(reveal)

    def plan_entropy(self) -> float:
        """H(plan) in nats."""
        return float(sum(entropy(prior) for prior in self.prior))

    # -- samples ----------------------------------------------------------------------------------------------------

    def sample_plans(self, n: int, generator: Generator) -> Tensor:
        """(n, A) int64"""
        return torch.stack([torch.multinomial(p, n, replacement=True, generator=generator) for p in self.prior], -1)

    def sample_texts(self, plans: Tensor, generator: Generator) -> Tensor:
        """One text for each plan (N, A): (N, R) ids, end-of-text after the last word."""
        chosen = torch.multinomial(self.template_posterior(plans), 1, generator=generator).squeeze(-1)
        texts = torch.full((len(plans), self.length), self.eos_id)
        for tau, template in enumerate(self.grammar.templates):
            rows = (chosen == tau).nonzero().squeeze(-1)
            if len(rows) == 0:
                continue
            for position, slot in enumerate(template.slots):
                none_said = torch.zeros(len(rows), dtype=torch.long)
                values = none_said if slot.attribute is None else plans[rows, self.index[slot.attribute]]
                texts[rows, position] = self._draw_words(tau, position, values, generator)
        return texts

    def sample_continuations(self, reveal: Tensor, generator: Generator) -> Tensor:
        """A text from p(x | c) for each row of reveal, drawn by completing the plan: (N, R)."""
        plans = [torch.multinomial(table, 1, generator=generator) for table in self.posterior(reveal)]
        return self.sample_texts(torch.cat(plans, -1), generator)

    def all_texts(self, most: int = 100_000) -> Tensor:
        """Every text of positive probability, (T, R). Raises ValueError where there are more than `most`."""
        texts: dict[tuple[int, ...], None] = {}
        for tau, template in enumerate(self.grammar.templates):
            used = sorted({self.index[s.attribute] for s in template.slots if s.attribute is not None})
            for values in product(*(self.allowed[tau][a].nonzero().flatten().tolist() for a in used)):
                plan = dict(zip(used, values, strict=True))
                choices = []
                for position, slot in enumerate(template.slots):
                    value = 0 if slot.attribute is None else plan[self.index[slot.attribute]]
                    choices.append(self.emission[tau][position][value].nonzero().flatten().tolist())
                for text in product(*choices):
                    texts[text + (self.eos_id,) * (self.length - len(text))] = None
                    if len(texts) > most:
                        raise ValueError(f"more than {most} texts are possible")
        return torch.tensor(list(texts))

    def plans_of(self, texts: Tensor) -> Tensor:
        """The plan of each valid text, (N, A); -1 for an attribute it does not mention, all -2 if invalid."""
        plans = torch.full((len(texts), len(self.prior)), -2)
        for tau, template in enumerate(self.grammar.templates):
            fits = [allowed.bool().expand(len(texts), -1) for allowed in self.allowed[tau]]
            valid = (texts[:, len(template.slots) :] == self.eos_id).all(-1)
            mentioned = {self.index[s.attribute] for s in template.slots if s.attribute is not None}
            for position, slot in enumerate(template.slots):
                possible = (self.emission[tau][position] > 0).T.contiguous()[texts[:, position]]
                if slot.attribute is None:
                    valid = valid & possible[:, 0]
                else:
                    fits[self.index[slot.attribute]] = fits[self.index[slot.attribute]] & possible
            valid = valid & torch.stack([fit.any(-1) for fit in fits]).all(0)
            for a, fit in enumerate(fits):
                value = fit.long().argmax(-1) if a in mentioned else torch.tensor(-1)
                plans[:, a] = torch.where(valid, value, plans[:, a])
        return plans

    def _draw_words(self, tau: int, position: int, values: Tensor, generator: Generator) -> Tensor:
        """A word of the slot for each value (n,): inverse of the cumulative distribution over its few words."""
        probability, word = self._few_words(tau, position)
        bounds = probability.cumsum(-1)[:, :-1][values]
        choice = (torch.rand(len(values), 1, generator=generator, dtype=torch.float64) >= bounds).sum(-1)
        return word[values, choice]

    def _few_words(self, tau: int, position: int) -> tuple[Tensor, Tensor]:
        """Probabilities and ids (K, W) of the words of each value; p = 0 where a value has fewer than another."""
        emission = self.emission[tau][position]
        probability, word = emission.topk(int((emission > 0).sum(-1).max()), dim=-1)
        return probability, word

    # -- tables -----------------------------------------------------------------------------------------------------

    def _emission(self, words) -> Tensor:
        table = torch.zeros(len(words), self.vocab_size, dtype=torch.float64)
        for k, choices in enumerate(words):
            for word, probability in choices:
                table[k, self.word_id[word]] += probability
        return table / table.sum(-1, keepdim=True)

    def _allowed(self, template: Template, name: str) -> Tensor:
        values = len(self.prior[self.index[name]])
        only = template.only.get(name, range(values))
        return torch.tensor([float(k in only) for k in range(values)], dtype=torch.float64)

    def _within(self, reveal: Tensor) -> list[list[Tensor]]:
        """p(a = k | c, template) by template and attribute, each (N, K); zeros where the template cannot be used."""
        tables = self.posterior(reveal)
        fitting = [[table * fits for table, fits in zip(tables, allowed, strict=True)] for allowed in self.allowed]
        return [[table / table.sum(-1, keepdim=True).clamp(min=1e-300) for table in row] for row in fitting]

    def _check(self) -> None:
        """The closed-form entropies need texts that name their template and values, and templates that share out p = 1."""
        nothing = torch.full((1, len(self.prior)), -1)
        total = self.template_posterior(nothing).sum().item()
        if abs(total - 1) > 1e-9:
            raise ValueError(f"template weights times what they fit sum to {total}, not 1")
        for tau, template in enumerate(self.grammar.templates):
            for a, name in enumerate(self.index):
                tables = [
                    (e > 0).double()
                    for e, s in zip(self.emission[tau], template.slots, strict=True)
                    if s.attribute == name
                ]
                keep = self.allowed[tau][a] > 0
                confusable = torch.ones(int(keep.sum()), int(keep.sum()), dtype=torch.bool)
                for table in tables:
                    confusable &= table[keep] @ table[keep].T > 0
                if tables and confusable.triu(1).any():
                    raise ValueError(f"template {template.name}: two values of {name} can have the same words")
            for other in range(tau):
                if not self._distinguishable(tau, other):
                    raise ValueError(f"{template.name} and {self.grammar.templates[other].name} can give the same text")

    def _distinguishable(self, first: int, second: int) -> bool:
        for position in range(self.length):
            supports = []
            for tau in (first, second):
                slots = self.emission[tau]
                if position < len(slots):
                    supports.append(slots[position].sum(0) > 0)
                else:
                    supports.append(torch.arange(self.vocab_size) == self.eos_id)
            if not (supports[0] & supports[1]).any():
                return True
        return False


def _normalised(weights) -> Tensor:
    table = torch.tensor(weights, dtype=torch.float64)
    return table / table.sum()
