"""ConceptHead and ConceptEmbedding: a shallow state becomes one of K codes, and the code what the middle stack reads.

Legend: B batch, M concepts, D width, K codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.functional.commit_gates import keep_null_mass
from models.functional.errors import UsageError
from models.functional.gumbel import gumbel_noise, gumbel_st, straight_through
from models.functional.precision import at_least_float32

FIRST_LOGITS = 4.0  # spread of a fresh head's logits: with less the noise of a draw drowns the choice


class Coded(NamedTuple):
    """embeds (B, M, D) for the middle stack; ids (B, M); probabilities (B, M, K) without noise.

    error (B, M): squared distance of the code's embedding to the state, in units of the state's own square.
    """

    embeds: Tensor
    ids: Tensor
    probabilities: Tensor
    error: Tensor


class ConceptCodes(nn.Module):
    """codes: K. Each embedding starts where the head's code points; loudness: the root mean square it starts with."""

    def __init__(self, width: int, codes: int, loudness: float = 1.0, **like) -> None:
        super().__init__()
        if codes < 2:
            raise UsageError(f"module.codes={codes} must be at least 2, such as module.codes=4096")
        self.codes = codes
        self.head = nn.Linear(width, codes, bias=False, **like)
        self.embedding = nn.Embedding(codes, width, **like)
        nn.init.normal_(self.head.weight, std=FIRST_LOGITS / width**0.5)
        with torch.no_grad():
            self.embedding.weight.copy_(loudness * self.normed(self.head.weight))

    @staticmethod
    def normed(hidden: Tensor) -> Tensor:
        """States of unit root mean square: how loud a state is says nothing of its code."""
        return F.rms_norm(hidden, hidden.shape[-1:])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., K)"""
        return self.head(self.normed(hidden))

    def forward(
        self,
        hidden: Tensor,
        commit_probability: Tensor,
        *,
        quantisation: float,
        temperature: float = 1.0,
        noise: float = 0.0,
        generator: Generator | None = None,
        null_mass: bool = False,
    ) -> Coded:
        """hidden (B, M, D) of the positions that commit -> (1 - a) h + a e with a = quantisation.

        e = e_hard + e_soft - sg(e_soft), both halves of one Gumbel sample; noise 0 takes the most probable code. null_mass: the
        soft half keeps NULL's share of the choice, so that the decision to commit gets a gradient through it.
        At a = 0 the state itself goes through and the backbone is what it was; in training the codes learn even then.
        """
        if quantisation == 0 and not self.training:
            nothing = hidden.new_zeros(*hidden.shape[:2])
            return Coded(hidden, nothing.long(), hidden.new_zeros(*hidden.shape[:2], self.codes), nothing)
        logits = at_least_float32(self.logits(hidden))
        draws = noise * gumbel_noise(logits, generator) if noise else torch.zeros_like(logits)
        choice = gumbel_st(logits, temperature, draws)
        soft = keep_null_mass(choice.soft, commit_probability) if null_mass else choice.soft
        weights = straight_through(choice.hard, soft).to(hidden.dtype)
        e = weights @ self.embedding.weight
        error = (e - hidden.detach()).square().mean(-1) / hidden.detach().square().mean(-1).clamp(min=1e-8)
        embeds = torch.lerp(hidden, e, quantisation)
        return Coded(embeds, choice.hard.argmax(-1), logits.softmax(-1), error)
