r"""The rate of commits: a router's initial bias, the ratio loss, and the control of the realised rate.

Legend: R compression, positions a concept; F share of positions that commit; G mean probability of a commit.
"""

import math

import torch
from torch import Tensor


def null_bias(compression: float, codes: int = 1) -> float:
    """ln(K (R - 1)): the NULL logit beside K code logits of 0 with which P(commit) = 1/R; needs R > 1."""
    return math.log(codes * (compression - 1))


def ratio_loss(commits: Tensor, probabilities: Tensor, valid: Tensor, compression: float) -> Tensor:
    r"""R / (R - 1) ((R - 1) F G + (1 - F)(1 - G)) (Hwang et al., Dynamic Chunking, 2507.07955); all (B, T).

    F is counted and has no gradient. dL/dG = R / (R - 1) (R F - 1): G falls while the realised rate is above 1/R and rises
    while it is below. The loss is 1 at F = G = 1/R, which is a saddle point and no minimum. Needs R > 1.
    """
    count = valid.sum().clamp(min=1)
    hard = (commits & valid).sum().to(probabilities.dtype) / count
    soft = (probabilities * valid).sum() / count
    return compression / (compression - 1) * ((compression - 1) * hard * soft + (1 - hard) * (1 - soft))


def correction(offset: Tensor, realised: Tensor, compression: float, spread: Tensor, gain: float = 0.5) -> Tensor:
    """The next offset, which is subtracted from every score: it grows while more than 1/R of the positions commit.

    An integral controller. spread: the scores' standard deviation, so that the step does not depend on their scale.
    """
    return offset + gain * spread * (realised - 1 / compression)


def rate_threshold(mean: Tensor, spread: Tensor, compression: float) -> Tensor:
    """The value that 1/R of normally distributed scores exceed; needs R > 1."""
    return mean + spread * torch.special.ndtri(torch.full_like(mean, 1 - 1 / compression))
