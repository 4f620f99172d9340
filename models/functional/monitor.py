"""Statistics of generated texts: how much they depend on the noise, and how diverse they are."""

import torch
from torch import Tensor


def plug_in_entropy(samples: Tensor) -> float:
    """Entropy in nats of the distribution that rows (N, R) were drawn from, with the Miller-Madow bias correction.

    Still too low unless N is far above exp(H): compare it with as many draws from the truth, which have the same bias.
    """
    _, counts = torch.unique(samples, dim=0, return_counts=True)
    p = counts.double() / counts.sum()
    return float(-torch.xlogy(p, p).sum() + (len(counts) - 1) / (2 * len(samples)))


def noise_information(texts: Tensor) -> float:
    """I(ε; x | c) in nats for a deterministic map of the noise, averaged over prompts: (C, N, R) texts of N noises each.

    I = H(x | c) - H(x | ε, c), and the last term is 0 where each noise gives one text. 0 means that the noise is ignored.
    """
    return sum(plug_in_entropy(own) for own in texts) / len(texts)


def distinct_share(texts: Tensor) -> float:
    """Different texts among the N of each prompt, averaged over prompts: (C, N, R) -> share in (0, 1]."""
    return sum(len(torch.unique(own, dim=0)) / len(own) for own in texts) / len(texts)
