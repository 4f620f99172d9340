"""Continuous diffusion: masks carry noise, and a denoiser gives the distribution of the token behind each of them.

Points move on a line from a noisy mask to the token's embedding; the embedding table is fixed and everything else trains.
Legend: B batch, L length.
"""

from torch import Generator, Tensor, nn

from models.backbones.bidirectional import require_bidirectional
from models.backbones.llada import LladaModel
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.path import hide_response
from models.functional.errors import require_share
from models.functional.masked_diffusion import antithetic_times
from models.functional.next_token import bidirectional_text
from models.functional.nll import chosen_nll
from models.interfaces.objective import Terms, TextObjective


class ContinuousDiffusion(TextObjective, nn.Module):
    """Mean cross entropy of D_s(z_s) at the noisy positions, s uniform in warped time: `adapt_to_noise` without a teacher.

    sigma, time_center: see `NoisyMaskPath`. observed_share: rows with part of the response given.
    No bound on the likelihood is claimed: that of the flow would need its divergence along every path.
    """

    generation = "flow"
    attention = "bidirectional"

    def __init__(self, sigma: float = 2.0, time_center: float = 0.5, observed_share: float = 0.1) -> None:
        super().__init__()
        require_share(module__objective__observed_share=observed_share)
        self.sigma, self.time_center, self.observed_share = sigma, time_center, observed_share

    def attach(self, model: LladaModel) -> None:
        require_bidirectional(model, "continuous_diffusion")
        self.student = NoisyMaskStudent(model, adapter="full", sigma=self.sigma, time_center=self.time_center)

    def trained(self, model: LladaModel) -> nn.Module:
        return self.student.body

    def after_step(self, model: LladaModel) -> None:
        self.student.project_weights()

    def expected_predictions(self, batch: dict[str, Tensor]) -> float:
        # a partly observed row hides each token with a probability that is uniform
        return (1 - self.observed_share / 2) * int(bidirectional_text(batch)[2].sum())

    def forward(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> Terms:
        x0, attention_mask, maskable = bidirectional_text(batch)
        rows = {"input_ids": x0, "attention_mask": attention_mask, "response_mask": maskable}
        # 1. a time for each row and its point on the line
        masked = hide_response(rows, self.observed_share, generator)
        times = antithetic_times(len(x0), generator, x0.device).to(model.embedding.dtype)
        s = self.student.path.warp(times)
        sample = self.student.path.sample(rows, masked, s, generator)
        # 2. the denoiser's cross entropy
        nll = chosen_nll(self.student(sample, s), x0, masked)
        return Terms.over_tokens(nll.sum(), int(masked.sum()), nll, predictions=masked.sum())
