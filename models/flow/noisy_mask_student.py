"""The student of the noisy-mask flow: a frozen masked diffusion LM, adapted to masks that carry noise and to (s, t).

Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from models.backbones.llada import LladaModel
from models.backbones.twin import with_lora, with_own_weights
from models.flow.soft_prompt import SoftPrompt
from models.flow.student import Student
from models.functional.errors import UsageError, require_choice
from models.functional.noisy_mask import flow_map, noisy_mask, token_evidence, warp_time, wiener_gain
from models.functional.precision import at_least_float32, without_autocast
from models.functional.text_posterior import same_prompt, text_evidence, text_posterior, token_posterior

Adapter = Literal["prefix", "prefix+mask_noise", "lora", "full"]
TEXTS_AT_ONCE = 256  # whose embeddings are in memory together


class NoisyMaskStudent(Student):
    """ψ_{s,t}(z): what each masked position becomes, on average over [s, t], given noisy masks z.

    adapter: what trains, beside the prefix that is a function of the interval.
      `prefix`: nothing else; the frozen base reads z as it is, so it starts away from the teacher.
      `prefix+mask_noise`: the base reads m + (c_s + W)(z_s - m) at masked positions, c_s as `wiener_gain` has it: the mask
        at s = 0, the token's own embedding at s = 1. W starts at 0, where the noise has no effect on the first forward and
        the student is the masked teacher for every ε, and has a live gradient there.
      `lora`: W and low-rank adapters on every linear layer.
      `full`: W and a trainable copy of all layers and the head; the embedding table stays the teacher's.
    sigma: the noise of a mask in units of the embedding table's root mean square coordinate.
    time_center: where tokens become decodable; times are drawn and steps are taken evenly in q with s = warp(q).
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
    ) -> None:
        require_choice("module.adapter", adapter, get_args(Adapter))
        if sigma <= 0:
            raise UsageError(f"module.sigma={sigma} must be above 0: without noise one forward says one text a prompt")
        sizes = {"prompt_length": prompt_length, "hidden_size": hidden_size, "rank": rank}
        super().__init__(base, adapter=adapter, sigma=sigma, time_center=time_center, lora_rank=lora_rank, **sizes)
        self.warp(torch.zeros(1))  # refuses a wrong time_center
        embedding = base.embedding.detach().float()
        self.noise_scale = sigma * embedding.square().mean().sqrt().item()
        self.spread = (embedding - embedding[base.mask_id]).square().mean().sqrt().item()
        if adapter == "lora":
            self.body = with_lora(self.base, lora_rank)
        elif adapter == "full":
            self.body = with_own_weights(self.base)
        else:
            self.body = self.base
        self.soft_prompt = SoftPrompt(base.config, **sizes)
        self.mask_noise = None
        if adapter != "prefix":
            width = base.config.hidden_size
            self.mask_noise = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.mask_noise.weight)

    @property
    def mask_embedding(self) -> Tensor:
        """(D,)"""
        return self.base.embedding[self.base.mask_id]

    def warp(self, q: Tensor) -> Tensor:
        """Data times s of even times q, see `warp_time`."""
        return warp_time(q, self.options["time_center"])

    def start(self, rows: dict[str, Tensor], masked: Tensor, generator: Generator) -> Tensor:
        """(B, L, D): fresh noisy masks where `masked` (B, L), the embeddings of `input_ids` elsewhere."""
        noise = noisy_mask(self.mask_embedding, self.noise_scale, tuple(masked.shape), generator)
        return torch.where(masked.unsqueeze(-1), noise, self.base.embed(rows["input_ids"]))

    def forward(self, z: Tensor, masked: Tensor, attention_mask: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Logits of ψ_{s,t} at the masked positions, row by row: (B, L, D), (B, L), (B, L), (B,), (B,) -> (M, V).

        Without gradients s and t may be (1,), the same for all rows.
        """
        if self.mask_noise is not None:
            mask, gain = self.mask_embedding, wiener_gain(s, self.noise_scale, self.spread).view(-1, 1, 1)
            apart = (z - mask).to(self.mask_noise.weight.dtype)
            z = torch.where(masked.unsqueeze(-1), mask + (gain * apart + self.mask_noise(apart)).to(mask.dtype), z)
        prefix = self.soft_prompt(1 - t, 1 - s)  # its own times are noise times, r <= t
        logits = self.body.lm_head(self.body.hidden(z, attention_mask, prefix)[masked])
        return at_least_float32(logits)

    def evidence(self, z: Tensor, s: Tensor) -> Tensor:
        """log p(z_s | token) of every token at noisy positions, up to a constant: (..., D), (...) -> (..., V) float64."""
        mask, embedding = self.mask_embedding.double(), self.base.embedding.double()
        return token_evidence(z.double(), mask, embedding, s.double(), self.noise_scale)

    @torch.no_grad()
    def token_posterior(self, z: Tensor, masked: Tensor, s: Tensor, given: Tensor, texts: Tensor) -> Tensor:
        """What the masked places of z_s (B, L, D) may be, by those of texts (N, L) that `given` (B, L) allows: (M, V)."""
        alike, used = same_prompt(given, masked, texts), masked.any(0)
        kept = alike.any(0)  # what no row could be needs no products, nor do prompts
        mask = at_least_float32(self.mask_embedding)
        apart = (z[:, used] - mask).to(mask.dtype)
        with without_autocast(z):
            evidence = [
                text_evidence(apart, masked[:, used], self.base.embed(few).to(mask.dtype) - mask, s, self.noise_scale)
                for few in texts[kept][:, used].split(TEXTS_AT_ONCE)
            ]
        shares = text_posterior(torch.cat(evidence, 1), alike[:, kept])
        return token_posterior(shares, texts[kept][:, used], masked[:, used], len(self.base.embedding))

    def expected(self, psi: Tensor) -> Tensor:
        """ψ E, the mean embedding of distributions (..., V) -> (..., D), in the base's precision."""
        with without_autocast(psi):
            return psi.to(self.base.embedding.dtype) @ self.base.embedding

    def project_(self) -> None:
        """A gate cannot be negative."""
        self.soft_prompt.project_()

    def move(self, z: Tensor, masked: Tensor, psi: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """X_{s,t}(z) at the masked positions with ψ (M, V) given there, z (B, L, D) elsewhere; s, t (B,) or (1,)."""
        s, t = (time.unsqueeze(-1).expand(masked.shape)[masked] for time in (s, t))
        moved = z.clone()
        moved[masked] = flow_map(z[masked], self.expected(psi), s, t).to(z.dtype)
        return moved
