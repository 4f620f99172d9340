"""How a frozen masked LM reads noise: as soft tokens beside its masks, and each position's own noise by Bayes' rule.

A masked LM was trained to read masks and tokens, and to predict where it reads a mask. A noisy mask is neither. Here a
masked position stays a mask. Beside it, at the same place, stands a soft token: what its own noise says of its token. The
other positions read it. Its own prediction does not: there the likelihood of the noise is added to the logits,
D_s(x_l | z) ∝ p(z_l | x_l) P(x_l | the others), which is exact for the denoiser of the others' evidence.
Legend: B batch, L length, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

import torch
from torch import Tensor, nn

from models.flow.path import NoisyMaskPath, PathSample
from models.functional.noisy_mask import soft_token, token_evidence
from models.functional.precision import at_least_float32, without_autocast

LATEST = 0.98  # later evidence is as certain, and overflows
AHEAD = 0.4  # at the start of training: s/(1 - s)² at s = 0.23, where texts begin to be decided


class SoftTokens(nn.Module):
    """A soft token and the evidence of every position.

    Trains a prior of tokens for each of the first `prior_length` columns of a response (further ones have the last one's): a
    vector that the base's head reads. And two numbers κ: a jump from s to t reads its noise with the further weight κ (t - s),
    one for soft tokens and one for the logits. At t = s nothing is added, and the evidence is exact.
    """

    def __init__(self, path: NoisyMaskPath, prior_length: int) -> None:
        super().__init__()
        self.path = path
        self.prior = nn.Embedding(prior_length, path.embedding.shape[1])
        nn.init.zeros_(self.prior.weight)
        self.ahead = nn.Parameter(torch.full((2,), AHEAD))

    def forward(self, sample: PathSample, t: Tensor) -> tuple[Tensor, Tensor]:
        """Soft tokens (B, L, D), and the evidence for the logits of each position (B, L, V). t is like sample.s."""
        mask, embedding = at_least_float32(self.path.mask_embedding), at_least_float32(self.path.embedding)
        z, s = at_least_float32(sample.z), sample.s
        with without_autocast(z):
            # 1. the likelihood of each position's own noise, once for soft tokens and once for logits
            reading, writing = (
                token_evidence(
                    z,
                    mask,
                    embedding,
                    s.clamp(max=LATEST).unsqueeze(-1),
                    self.path.noise_scale,
                    (weight * (t - s)).unsqueeze(-1),
                )
                for weight in self.ahead
            )
            # 2. Bayes' rule with the prior of the column
            head = self.path.base.lm_head
            columns = self.prior(torch.arange(self.prior.num_embeddings, device=z.device))
            of_columns = at_least_float32(head(columns.to(head.weight.dtype))).log_softmax(-1)
            log_prior = of_columns[(sample.response_mask.long().cumsum(-1) - 1).clamp(0, len(of_columns) - 1)]
            posterior = (log_prior + reading).softmax(-1)
            # 3. between the mask and the mean token
            return soft_token(posterior, log_prior.exp(), mask, embedding), writing
