r"""The posterior of a noisy point's text, among several texts of the same prompt.

At small s a point z_s holds little information on the text x that it was made from, so cross entropy against x has a large
variance. Other texts y_2 ... y_n of the same prompt, drawn from the same distribution, reduce it: with y_1 = x and

.. math:: w_j = p(z_s | y_j) / \sum_k p(z_s | y_k),

the mean over x from p(x | z_s) and over the others of Σ_j w_j f(y_j) is E[f(x) | z_s], exactly and for any n: exchanging x for
y_j with probability w_j leaves p(x | z_s) as it is (iterated sampling importance resampling; Andrieu, Lee, Vihola, Uniform
ergodicity of the iterated conditional SMC, 2018). It is enough that x and the others are exchangeable, as different rows of a
shuffled corpus are; a second copy of the row itself is not. So targets may be averaged over the w_j: the mean stays, the
variance falls (Rao-Blackwell). For scores of images this is the stable target field (Xu, Tong, Jaakkola, 2023).
Legend: B rows, N texts, L length, D width, M masked positions, V vocabulary.
"""

import torch
from torch import Tensor

from models.functional.precision import at_least_float32


def same_prompt(given: Tensor, masked: Tensor, texts: Tensor) -> Tensor:
    """Whether texts (N, L) agree with rows (B, L) wherever these are not masked: (B, N) bool."""
    return ~((given.unsqueeze(1) != texts) & ~masked.unsqueeze(1)).any(-1)


def text_evidence(apart: Tensor, masked: Tensor, clean: Tensor, s: Tensor, sigma: float) -> Tensor:
    """log p(z_s | y) of N texts, up to what they share: (B, N) nats.

    apart z_s - m (B, L, D) and clean E_y - m (N, L, D), from the mask's embedding; masked (B, L): where z_s is noisy;
    s (B,) in [0, 1]; σ in the units of the embedding's coordinates.
    [s <z_s - m, E_y - m> - s² |E_y - m|² / 2] / ((1 - s)² σ²), summed over masked positions.
    """
    apart, clean = at_least_float32(apart), at_least_float32(clean)
    s = s.to(apart.dtype).clamp(max=1 - 1e-7).unsqueeze(-1)  # at s = 1 the density has no width
    signal = (apart * masked.unsqueeze(-1)).flatten(1) @ clean.flatten(1).T
    power = masked.to(apart.dtype) @ clean.square().sum(-1).T
    return (s * signal - s.square() * power / 2) / ((1 - s) * sigma).square()


def text_posterior(evidence: Tensor, alike: Tensor) -> Tensor:
    """w (B, N): each text's share in p(text | z_s) among those that are `alike` (B, N), of which each row must have one."""
    return evidence.masked_fill(~alike, -torch.inf).softmax(-1)


def token_posterior(shares: Tensor, texts: Tensor, masked: Tensor, vocabulary: int) -> Tensor:
    """The distribution of each masked token over texts with these shares: Σ_j w_j 1[y_j,l = v], (M, V).

    shares w (B, N); texts (N, L) ids; masked (B, L). (B, L, V) are in memory: leave out columns that no row has masked.
    """
    row, text = shares.nonzero(as_tuple=True)
    cell = torch.arange(masked.shape[1], device=texts.device) * vocabulary + texts[text]
    share = shares[row, text].unsqueeze(-1).expand(cell.shape)
    posterior = shares.new_zeros(len(masked), masked.shape[1] * vocabulary)
    posterior.index_put_((row.unsqueeze(-1), cell), share, accumulate=True)
    return posterior.view(*masked.shape, vocabulary)[masked]
