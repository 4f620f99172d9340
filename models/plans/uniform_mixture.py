r"""Texts of one forward pass under a uniform index instead of a learned plan: what a plan is compared with.

.. math:: p(x \mid u) = \frac{1}{K} \sum_{k=1}^{K} \prod_{l \le e(x)} p(x_l \mid k, u)

The index is one more input of a network that reads the prompt, as that of Di4C is (Hayakawa et al., 2410.08709). No prior is
learned: every index has probability 1/K for every prompt. With K = 1 the tokens are independent given the prompt, as in one
step of a masked model. Di4C distils a teacher of many steps; here the likelihood of texts is maximised, whose sum over indices
is exact.
Legend: B batch, N texts, T prompt columns, R text columns, K indices, V text vocabulary.
"""

import math

import torch
from torch import Generator, Tensor

from models.functional.bits_per_byte import token_nll
from models.functional.gumbel import sample_categorical
from models.functional.next_token import EndIds, as_end_ids, until_end
from models.functional.one_forward import log_mixture, nll_of_texts, responsibilities
from models.functional.precision import at_least_float32
from models.interfaces.decoder import TokenCallback
from models.plans.executor_columns import opening
from models.plans.layout import joined
from models.plans.rows import Tokens
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary


def index_vocabulary(indices: int, base: int) -> ConceptVocabulary:
    """The index as the only concept of a plan; a vocabulary has at least two codes, of which a single index uses one."""
    return ConceptVocabulary({"index": {"codes": max(2, indices), "most": 1}}, base)


class UniformMixture:
    """Scores and generates texts with a shared `UnifiedModel` of `index_vocabulary`; it has no weights of its own.

    It reads [<BOS>, index, <TEXT>, prompt, R masks] without a causal mask. end_ids: the tokens that end a text, as of
    `ParallelExecutor`.
    """

    def __init__(self, model: UnifiedModel, indices: int, end_ids: EndIds = None) -> None:
        self.model, self.layout, self.indices, self.end_ids = model, model.layout, indices, end_ids

    def logits(self, prompt: Tokens, index: Tensor, length: int) -> Tensor:
        """Logits (B, R, V) of all tokens of texts of R = length columns, given prompts (B, T) and indices (B,) from 0."""
        ids, seen = prompt
        # 1. the index, as a plan of one concept
        block = self.layout.block(1 + index.unsqueeze(-1))
        opened, columns = opening(self.model, block, self.model.embed(block, self.layout.of_block(block).type_ids))
        # 2. the prompt, and a mask for every token
        masks = ids.new_full((len(ids), length), self.layout.vocabulary.blank)
        own = self.layout.of_text(torch.cat([seen.bool(), torch.ones_like(masks, dtype=torch.bool)], 1))
        read = self.model.embed(torch.cat([ids, masks], 1), own.type_ids)
        # 3. each token from its own column
        states = self.model.states(torch.cat([opened, read], 1), joined(columns, own), bidirectional=True)
        return self.model.text_logits(states[:, -length:])

    def nll(self, prompt: Tokens, index: Tensor, text: Tensor) -> Tensor:
        """-log p(x_l | k, u) in nats of texts (B, R) and their indices (B,), (B, R); 0 after the first end token."""
        nll = token_nll(self.logits(prompt, index, text.shape[1]), text)
        return nll.masked_fill(~until_end(text, self.end_ids), 0.0)

    def nll_of_indices(self, prompt: Tokens, text: Tensor) -> Tensor:
        """-log p(x | k, u) in nats of texts (N, R) given every index, (N, K); equal prompts are read once an index."""
        both, which = torch.unique(torch.cat([prompt[0], prompt[1].long()], -1), dim=0, return_inverse=True)
        every = torch.arange(self.indices, device=text.device)
        counted, parts, rows = until_end(text, self.end_ids), list[Tensor](), list[Tensor]()
        for number, row in enumerate(both):
            own = (which == number).nonzero().flatten()
            words, seen = row.expand(self.indices, -1).chunk(2, -1)
            log_p = at_least_float32(self.logits((words, seen), every, text.shape[1])).log_softmax(-1)
            parts.append(nll_of_texts(log_p, text[own], counted[own]))
            rows.append(own)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def log_prob(self, nll: Tensor) -> Tensor:
        """log p(x | u) in nats, float64, (N,), from `nll_of_indices` (N, K)."""
        return log_mixture(torch.full_like(nll, -math.log(self.indices)), -nll)

    def index_bits(self, nll: Tensor) -> Tensor:
        """KL(p(k | u, x) || 1/K) in bits, float64, (N,), from `nll_of_indices` (N, K): how much a text tells of its index."""
        share = responsibilities(torch.zeros_like(nll), -nll)
        return math.log2(self.indices) + (share * share.clamp(min=1e-300).log2()).sum(-1)

    @torch.no_grad()
    def draw_index(self, prompt: Tokens, text: Tensor, generator: Generator) -> Tensor:
        """k ~ p(k | u, x) of each text, (N,). The gradient of -log p(x | k, u) is then that of -log p(x | u), in the mean."""
        return sample_categorical(-self.nll_of_indices(prompt, text), 1.0, generator)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tokens,
        index: Tensor,
        length: int,
        generator: Generator,
        temperature: float,
        vocab_size: int | None,
    ) -> Tensor:
        """Texts (B, length) in one forward pass; greedy at temperature 0. What is beyond an end is filled with the first."""
        drawn = sample_categorical(self.logits(prompt, index, length)[..., :vocab_size], temperature, generator)
        return drawn.masked_fill(~until_end(drawn, self.end_ids), next(iter(as_end_ids(self.end_ids)), 0))


class MixtureDecoder:
    """The index is drawn uniformly, all tokens in one forward pass. temperature: of tokens; 0 takes the most probable."""

    method = "student"
    refines = True
    forwards = 1

    def __init__(
        self, mixture: UniformMixture, response_length: int, *, temperature: float = 1.0, vocab_size: int | None = None
    ) -> None:
        self.mixture, self.length = mixture, response_length
        self.temperature, self.vocab_size = temperature, vocab_size
        index = "index uniform, " if mixture.indices > 1 else ""
        self.name = f"{index}text {'sampled' if temperature else 'greedy'}"

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        ids, mask = (rows[name][:, : -self.length] for name in ("input_ids", "attention_mask"))
        index = torch.randint(self.mixture.indices, (len(ids),), generator=generator, device=ids.device)
        text = self.mixture.generate((ids, mask), index, self.length, generator, self.temperature, self.vocab_size)
        if on_tokens is not None:
            on_tokens(text)
        return text
