"""The student of the noisy-mask flow: a frozen masked diffusion LM, adapted to masks that carry noise and to (s, t).

Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import require_prefix
from models.backbones.twin import with_lora, with_own_weights
from models.flow.path import NoisyMaskPath, PathSample
from models.flow.soft_prompt import SoftPrompt
from models.flow.student import Student
from models.functional.errors import UsageError, require_choice
from models.functional.precision import at_least_float32

Adapter = Literal["prefix", "prefix+mask_noise", "lora", "full"]
NoiseRead = Literal["linear", "token", "blend"]


class NoisyMaskStudent(Student):
    """ψ_{s,t}(z): the distribution of each masked token, averaged over [s, t], given noisy masks z.

    path: the noise process that its points come from (`NoisyMaskPath`; sigma and time_center are explained there).
    adapter: what trains, beside the prefix, which is a function of the interval.
      `prefix`: nothing else. The frozen base reads z as it is, so the student does not start as the teacher.
      `prefix+mask_noise`: the base reads m + (c_s + W)(z_s - m) at masked positions, with c_s of `wiener_gain`: the mask at
        s = 0, the token's own embedding at s = 1. W starts at 0. There the noise has no effect on the first forward pass,
        the student is the masked teacher for every ε, and W has a gradient.
      `lora`: W and low-rank adapters on every linear layer.
      `full`: W and a trainable copy of all layers and the head; the embedding table stays the teacher's.
    noise_read: what stands for c_s (z_s - m) there. `linear`: that. `token`: the mean embedding of the tokens that z_s may have
      been made from (`NoisyMaskPath.own_token`), for a vocabulary too large for a network to find the nearest token itself.
      `blend`: a mean of both, with the weight of how certain the token is: the noise where it stands for no token yet.
    """

    def __init__(
        self,
        base: LladaModel,
        *,
        adapter: Adapter = "full",
        noise_read: NoiseRead = "linear",
        sigma: float = 2.0,
        time_center: float = 0.5,
        prompt_length: int = 8,
        hidden_size: int = 128,
        rank: int = 32,
        lora_rank: int = 16,
    ) -> None:
        require_choice("module.adapter", adapter, get_args(Adapter))
        require_choice("module.noise_read", noise_read, get_args(NoiseRead))
        sizes = {"prompt_length": prompt_length, "hidden_size": hidden_size, "rank": rank}
        if adapter == "prefix" and noise_read != "linear":
            raise UsageError(
                f"module.noise_read={noise_read} has no effect on module.adapter=prefix, which reads noisy masks as they are; "
                "type module.adapter=prefix+mask_noise, lora or full"
            )
        times = {"sigma": sigma, "time_center": time_center}
        super().__init__(base, adapter=adapter, noise_read=noise_read, lora_rank=lora_rank, **times, **sizes)
        self.path = NoisyMaskPath(base, sigma=sigma, time_center=time_center)
        if adapter == "lora":
            self.body = with_lora(self.base, lora_rank)
        elif adapter == "full":
            self.body = with_own_weights(self.base)
        else:
            self.body = self.base
        require_prefix(base)
        self.soft_prompt = SoftPrompt(base.config, **sizes)
        self.mask_noise = None
        if adapter != "prefix":
            width = base.config.hidden_size
            self.mask_noise = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.mask_noise.weight)

    def forward(self, sample: PathSample, t: Tensor) -> Tensor:
        """Logits of ψ_{s,t} at the masked positions, row by row: (M, V). t is like sample.s (B,), or (1,) without gradients."""
        z = sample.z if self.mask_noise is None else self._read(sample, self.mask_noise)
        s = sample.s
        prefix = self.soft_prompt(1 - t, 1 - s)  # its own times are noise times, r <= t
        hidden = self.body.hidden(z, sample.attention_mask, prefix, sample.response_mask)
        return at_least_float32(self.body.lm_head(hidden[sample.masked]))

    def _read(self, sample: PathSample, mask_noise: nn.Linear) -> Tensor:
        """What the layers read at each position, (B, L, D): a mask with its noise, or the token of an observed one."""
        z, masked, mask = sample.z, sample.masked, self.path.mask_embedding
        apart = (z - mask).to(mask_noise.weight.dtype)
        if self.options["noise_read"] != "linear":
            own = torch.zeros_like(apart)
            times = sample.s.unsqueeze(-1).expand(masked.shape)[masked]
            blend = self.options["noise_read"] == "blend"
            own[masked] = (self.path.own_token(z[masked], times, blend=blend) - mask).to(own.dtype)
        else:
            own = self.path.gain(sample.s).view(-1, 1, 1) * apart
        return torch.where(masked.unsqueeze(-1), mask + (own + mask_noise(apart)).to(mask.dtype), z)

    def project_weights(self) -> None:
        """A gate cannot be negative."""
        self.soft_prompt.project_weights()
