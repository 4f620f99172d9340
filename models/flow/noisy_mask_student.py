"""The student of the noisy-mask flow: a frozen masked diffusion LM, adapted to masks that carry noise and to (s, t).

Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.backbones.llada import LladaModel, Prefix
from models.backbones.masked_from_causal import require_prefix
from models.backbones.twin import with_lora, with_lora_xs, with_own_weights
from models.flow.path import NoisyMaskPath, PathSample
from models.flow.soft_prompt import SoftPrompt
from models.flow.soft_tokens import SoftTokens
from models.flow.student import Student
from models.functional.attention import positions_from_mask, soft_token_attention
from models.functional.errors import UsageError, require_choice
from models.functional.precision import at_least_float32

Adapter = Literal["prefix", "prefix+mask_noise", "lora", "lora_xs", "full"]
NoiseInput = Literal["embedding", "soft_token"]


class NoisyMaskStudent(Student):
    """ψ_{s,t}(z): the distribution of each masked token, averaged over [s, t], given noisy masks z.

    path: the noise process that its points come from (`NoisyMaskPath`; sigma and time_center are explained there).
    adapter: what trains, beside the prefix, which is a function of the interval.
      `prefix`: nothing else. The frozen base reads z as it is, so the student does not start as the teacher.
      `prefix+mask_noise`: the base reads m + (c_s + W)(z_s - m) at masked positions, with c_s of `wiener_gain`: the mask at
        s = 0, the token's own embedding at s = 1. W starts at 0. There the noise has no effect on the first forward pass,
        the student is the masked teacher for every ε, and W has a gradient.
      `lora`: W and low-rank adapters on every linear layer.
      `lora_xs`: W and LoRA-XS on every linear layer, `LoraXsLinear`: a matrix (lora_rank, lora_rank) for each of them.
      `full`: W and a trainable copy of all layers and the head; the embedding table stays the teacher's.
    noise_input: how the base reads noise.
      `embedding`: at the masked positions, as above.
      `soft_token`: as soft tokens beside the masks (`SoftTokens`), without W. A pass has as many more columns as are masked.
    prior_length: of `SoftTokens`.
    Errors: UsageError for soft tokens and a base that is no LLaDA in which every position sees every other one.
    """

    def __init__(
        self,
        base: LladaModel,
        *,
        adapter: Adapter = "full",
        sigma: float = 2.0,
        time_center: float = 0.5,
        prompt_length: int = 8,
        hidden_size: int = 128,
        rank: int = 32,
        lora_rank: int = 16,
        noise_input: NoiseInput = "embedding",
        prior_length: int = 16,
    ) -> None:
        require_choice("module.adapter", adapter, get_args(Adapter))
        require_choice("module.noise_input", noise_input, get_args(NoiseInput))
        sizes = {"prompt_length": prompt_length, "hidden_size": hidden_size, "rank": rank}
        options = {"adapter": adapter, "sigma": sigma, "time_center": time_center, "lora_rank": lora_rank, **sizes}
        if noise_input == "soft_token":  # options of other students stay what saved ones have
            _require_soft_tokens(base, adapter)
            options |= {"noise_input": noise_input, "prior_length": prior_length}
        super().__init__(base, **options)
        self.path = NoisyMaskPath(base, sigma=sigma, time_center=time_center)
        if adapter == "lora":
            self.body = with_lora(self.base, lora_rank)
        elif adapter == "lora_xs":
            _require_llada(base, "module.adapter=lora_xs", "module.adapter=lora")
            self.body = with_lora_xs(self.base, lora_rank)
        elif adapter == "full":
            self.body = with_own_weights(self.base)
        else:
            self.body = self.base
        require_prefix(base)
        self.soft_prompt = SoftPrompt(base.config, **sizes)
        self.soft_tokens = SoftTokens(self.path, prior_length) if noise_input == "soft_token" else None
        self.mask_noise = None
        if adapter != "prefix" and self.soft_tokens is None:
            width = base.config.hidden_size
            self.mask_noise = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.mask_noise.weight)

    def forward(self, sample: PathSample, t: Tensor) -> Tensor:
        """Logits of ψ_{s,t} at the masked positions, row by row: (M, V). t is like sample.s (B,), or (1,) without gradients."""
        prefix = self.soft_prompt(1 - t, 1 - sample.s)  # its own times are noise times, r <= t
        if self.soft_tokens is None:
            hidden = self.body.hidden(self._read(sample), sample.attention_mask, prefix, sample.response_mask)
            return at_least_float32(self.body.lm_head(hidden[sample.masked]))
        soft, evidence = self.soft_tokens(sample, t)
        logits = self.body.lm_head(self._hidden_beside(sample, soft, prefix)[sample.masked])
        return at_least_float32(logits) + evidence[sample.masked]

    def _read(self, sample: PathSample) -> Tensor:
        """What the base reads at each position (B, L, D)."""
        z, s = sample.z, sample.s
        if self.mask_noise is not None:
            mask, gain = self.path.mask_embedding, self.path.gain(s).view(-1, 1, 1)
            apart = (z - mask).to(self.mask_noise.weight.dtype)
            read = mask + (gain * apart + self.mask_noise(apart)).to(mask.dtype)
            z = torch.where(sample.masked.unsqueeze(-1), read, z)
        return z

    def _hidden_beside(self, sample: PathSample, soft: Tensor, prefix: Prefix) -> Tensor:
        """The last hidden state of each column, with soft tokens beside those that are masked in some row: (B, L, D) each."""
        masked, seen = sample.masked, sample.attention_mask.bool()
        beside = masked.any(0)
        columns = torch.cat([torch.ones_like(beside), beside]).nonzero().squeeze(-1)
        text = torch.where(masked.unsqueeze(-1), self.path.mask_embedding, sample.z)
        embeds = torch.cat([text, soft.to(text.dtype)], 1)[:, columns]
        visible = soft_token_attention(seen, masked)[:, :, columns][..., columns]
        positions = positions_from_mask(seen).repeat(1, 2)[:, columns]
        return self.body.states(embeds, visible, positions, prefix=prefix)[:, : masked.shape[1]]

    def project_weights(self) -> None:
        """A gate cannot be negative."""
        self.soft_prompt.project_weights()


def _require_llada(base: LladaModel, option: str, instead: str) -> None:
    if not isinstance(base, LladaModel):
        raise UsageError(f"{option} needs a LLaDA teacher, not a {type(base).__name__}; type {instead}")


def _require_soft_tokens(base: LladaModel, adapter: Adapter) -> None:
    """Errors: UsageError for a base or an adapter without them."""
    if not isinstance(base, LladaModel) or base.config.block_causal:
        raise UsageError(
            "module.noise_input=soft_token needs a LLaDA teacher in which every position sees every other one; type "
            "module.noise_input=embedding"
        )
    if adapter == "prefix+mask_noise":
        raise UsageError(
            "module.noise_input=soft_token has no linear map of the noise; type module.adapter=prefix, lora or full with it"
        )
