"""Quantisation of concepts: a shallow hidden state becomes one of K codes, whose embedding the middle layers read.

`TableCodes` are rows of an embedding table, `SpaceCodes` points of a low-dimensional space.

Legend: B batch, M concepts, D width, K codes, d coordinates of a space.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.backbones.added_layers import AddedLinear
from models.backbones.code_space import CodeSpace, Sampler
from models.functional.commit_gates import keep_null_mass
from models.functional.gumbel import gumbel_noise, gumbel_st, straight_through
from models.functional.precision import at_least_float32
from models.functional.vector_quantisation import nearest_codes, quantised

FIRST_LOGITS = 4.0  # standard deviation of a fresh head's logits: with less, Gumbel noise outweighs them


class Coded(NamedTuple):
    """embeds (B, M, D) for the middle layers; ids (B, M); probabilities (B, M, K) without noise, 0 where they are not needed.

    error (B, M): squared distance of the code's embedding to the state, relative to the state's squared norm.
    points (B, M, d): the states in the space of a codebook that follows them (ema_vq); otherwise None.
    """

    embeds: Tensor
    ids: Tensor
    probabilities: Tensor
    error: Tensor
    points: Tensor | None = None


class Sampling(NamedTuple):
    """share: 0 the unquantised point, 1 the code, of codes in a space; temperature and noise: of Gumbel-softmax samples."""

    share: float
    temperature: float
    noise: float
    generator: Generator | None


class ConceptCodes(nn.Module):
    """Base of both kinds. codes: K."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.codes = codes

    @staticmethod
    def normed(hidden: Tensor) -> Tensor:
        """States of unit root mean square: the code depends on a state's direction, not on its norm."""
        return F.rms_norm(hidden, hidden.shape[-1:])

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

        null_mass: relaxed code weights sum to the commit probability, so that the decision to commit gets a gradient.
        At a = 0 the middle layers read the state itself; in training the codes learn even then.
        """
        if quantisation == 0 and not self.training:
            nothing = hidden.new_zeros(*hidden.shape[:2])
            return Coded(hidden, nothing.long(), hidden.new_zeros(*hidden.shape[:2], self.codes), nothing)
        mass = commit_probability if null_mass else None
        coded = self.choose(hidden, mass, Sampling(quantisation, temperature, noise, generator))
        error = (coded.embeds - hidden.detach()).square().mean(-1)
        error = error / hidden.detach().square().mean(-1).clamp(min=1e-8)
        return coded._replace(embeds=torch.lerp(hidden, coded.embeds.to(hidden.dtype), quantisation), error=error)

    def choose(self, hidden: Tensor, mass: Tensor | None, how: Sampling) -> Coded:
        """The codes of hidden (B, M, D), `embeds` their embeddings. mass (B, M): sum of the relaxed code weights; None is 1."""
        raise NotImplementedError

    def log_mass(self, hidden: Tensor) -> Tensor:
        """Log-sum-exp of the codes' logits, to compare with the logit of NULL, (..., D) -> (...)."""
        raise NotImplementedError

    @property
    def multiplied(self) -> int:
        """Weights in matrix products per concept: to find its code and its embedding."""
        raise NotImplementedError

    @property
    def weighed(self) -> int:
        """Weights in matrix products per position: to compare codes with NULL."""
        raise NotImplementedError


class TableCodes(ConceptCodes):
    """A linear head gives the logits of codes, an embedding table their embeddings (sampler gumbel_st).

    Each embedding starts as its row of the head, scaled to root mean square `embedding_std`.
    e = e_hard + e_soft - sg(e_soft), both of one Gumbel sample; noise 0 takes the most probable code.
    """

    def __init__(self, width: int, codes: int, embedding_std: float = 1.0, **like) -> None:
        super().__init__(codes)
        self.head = AddedLinear(width, codes, bias=False, **like)
        self.embedding = nn.Embedding(codes, width, **like)
        nn.init.normal_(self.head.weight, std=FIRST_LOGITS / width**0.5)
        with torch.no_grad():
            self.embedding.weight.copy_(embedding_std * self.normed(self.head.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., K), at least float32."""
        return self.head(at_least_float32(self.normed(hidden)))

    def choose(self, hidden: Tensor, mass: Tensor | None, how: Sampling) -> Coded:
        logits = self.logits(hidden)
        noise = how.noise * gumbel_noise(logits, how.generator) if how.noise else torch.zeros_like(logits)
        choice = gumbel_st(logits, how.temperature, noise)
        soft = choice.soft if mass is None else keep_null_mass(choice.soft, mass)
        weights = straight_through(choice.hard, soft).to(self.embedding.weight.dtype)
        e = weights @ self.embedding.weight
        return Coded(e, choice.hard.argmax(-1), logits.softmax(-1), e)

    def log_mass(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden).logsumexp(-1)

    @property
    def multiplied(self) -> int:
        return self.head.weight.numel()

    @property
    def weighed(self) -> int:
        return self.head.weight.numel()


class SpaceCodes(ConceptCodes):
    """Codes are points of a low-dimensional `CodeSpace`: a lattice (fsq), or running means of their points (ema_vq).

    Quantisation is deterministic: the nearest code, with the straight-through gradient of the point.
    """

    def __init__(self, width: int, codes: int, sampler: str, embedding_std: float = 1.0, **like) -> None:
        super().__init__(codes)
        space = CodeSpace(codes, width, embedding_std, sampler, "module.codes")
        self.space = space.to(like.get("device"), torch.promote_types(like.get("dtype", torch.float32), torch.float32))

    def choose(self, hidden: Tensor, mass: Tensor | None, how: Sampling) -> Coded:
        space = self.space
        point = space.point(at_least_float32(self.normed(hidden)))
        ids = nearest_codes(point, space.codes)
        e = space.to_embedding(quantised(point, space.codes[ids], how.share)).to(hidden.dtype)
        # probabilities of the other codes are needed in training alone
        near = space.logits(point).softmax(-1) if self.training else point.new_zeros(*ids.shape, self.codes)
        if mass is not None:  # a factor of value 1 with the gradient of the commit probability
            e = e * straight_through(torch.ones_like(mass), mass).to(e.dtype).unsqueeze(-1)
        return Coded(e, ids, near, e, point.detach() if space.moving else None)

    def log_mass(self, hidden: Tensor) -> Tensor:
        """ln K: every code has the same weight, at every state."""
        return at_least_float32(hidden.new_full(hidden.shape[:-1], math.log(self.codes)))

    @property
    def multiplied(self) -> int:
        space = self.space
        return space.to_point.weight.numel() + space.to_embedding.weight.numel() + space.codes.numel()

    @property
    def weighed(self) -> int:
        return 0


def build_codes(sampler: Sampler, width: int, codes: int, embedding_std: float = 1.0, **like) -> ConceptCodes:
    """The codebook of K codes that `sampler` names."""
    if sampler == "gumbel_st":
        return TableCodes(width, codes, embedding_std, **like)
    return SpaceCodes(width, codes, sampler, embedding_std, **like)
