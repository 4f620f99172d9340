"""The path of the noisy-mask flow: from a text to a noisy point, from point to point, and from a point to its text.

The equations are those of `models.functional.noisy_mask`. This class knows the embedding table that they need.
Legend: B batch, L length, M masked positions, D width, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from models.backbones.llada import LladaModel
from models.functional.errors import UsageError
from models.functional.masked_diffusion import mask_tokens, row_of_masked
from models.functional.noisy_mask import (
    certain_mean,
    flow_map,
    line_point,
    noisy_mask,
    token_evidence,
    velocity,
    warp_time,
    wiener_gain,
)
from models.functional.precision import at_least_float32, without_autocast
from models.functional.text_posterior import same_prompt, text_evidence, text_posterior, token_posterior

TEXTS_AT_ONCE = 256  # whose embeddings are in memory together
POSITIONS_AT_ONCE = 512  # whose distributions over the vocabulary are
NEARLY_CLEAN = 0.999  # evidence has a factor 1/(1 - s)²


class PathSample(NamedTuple):
    """Points of the path, and the texts that they belong to.

    z (B, L, D): a point at masked positions, the token's embedding elsewhere. masked, attention_mask, response_mask (B, L)
    bool: where points are, where text is, and which columns are of the response, of which a part may be masked.
    s: the time of each row (B,), or (1,) where all rows are at the same time. x0 (B, L): ids of the clean text. Where a text
    is still to be generated, its ids at masked positions mean nothing, and no network reads them.
    """

    z: Tensor
    masked: Tensor
    attention_mask: Tensor
    s: Tensor
    x0: Tensor
    response_mask: Tensor

    def rows(self, index: slice | Tensor) -> "PathSample":
        """Some of the rows; s must be (B,)."""
        return PathSample(*(column[index] for column in self))

    def followed_by(self, other: "PathSample") -> "PathSample":
        """The rows of both, one after the other."""
        return PathSample(*(torch.cat(columns) for columns in zip(self, other, strict=True)))


def hide_response(batch: dict[str, Tensor], observed_share: float, generator: Generator) -> Tensor:
    """Masked positions (B, L): the whole response, but in `observed_share` of the rows only a random part of it."""
    response = batch["response_mask"]
    partly, p = torch.rand(2, len(response), generator=generator, device=response.device)
    p = torch.where(partly < observed_share, p, 1.0)
    return mask_tokens(batch["input_ids"], response, p, 0, generator)[1]


class NoisyMaskPath:
    """z_s = (1 - s) z_0 + s E_x at masked positions, z_0 = m + σ ε; E the embedding table of `base`, m its mask's row.

    sigma: σ in units of the table's root mean square coordinate. time_center: where tokens become decodable; times are drawn
    and steps are taken evenly in q, with s = warp(q).
    Errors: UsageError for a sigma that is not above 0 or a time_center outside (0, 1).
    """

    def __init__(self, base: LladaModel, *, sigma: float = 2.0, time_center: float = 0.5) -> None:
        if sigma <= 0:
            raise UsageError(
                f"module.sigma={sigma} must be above 0: without noise, one forward pass gives one text for each prompt"
            )
        self.base, self.time_center = base, time_center
        self.warp(torch.zeros(1))  # refuses a wrong time_center
        embedding = base.embedding.detach().float()
        self.noise_scale = sigma * embedding.square().mean().sqrt().item()
        self.spread = (embedding - embedding[base.mask_id]).square().mean().sqrt().item()

    @property
    def embedding(self) -> Tensor:
        """E (V, D), looked up at each use: the base moves between devices."""
        return self.base.embedding

    @property
    def mask_embedding(self) -> Tensor:
        """m (D,)"""
        return self.base.embed(torch.tensor(self.mask_id, device=self.base.device))

    @property
    def mask_id(self) -> int:
        return self.base.mask_id

    def embed(self, ids: Tensor) -> Tensor:
        """E_x: (B, L) ids -> (B, L, D)."""
        return self.base.embed(ids)

    def warp(self, q: Tensor) -> Tensor:
        """Data times s of even times q, see `warp_time`."""
        return warp_time(q, self.time_center)

    # -- from a text to a point -------------------------------------------------------------------------------------

    def start(self, x0: Tensor, masked: Tensor, generator: Generator | None) -> Tensor:
        """z_0 (B, L, D): fresh noisy masks where `masked` (B, L), the embeddings of x0 (B, L) elsewhere."""
        noise = noisy_mask(self.mask_embedding, self.noise_scale, tuple(masked.shape), generator)
        return torch.where(masked.unsqueeze(-1), noise, self.embed(x0))

    def start_sample(self, batch: dict[str, Tensor], generator: Generator, masked: Tensor | None = None) -> PathSample:
        """Fresh noise at s = 0, at the whole response, or where `masked` (B, L) is true."""
        masked = batch["response_mask"] if masked is None else masked
        z0 = self.start(batch["input_ids"], masked, generator)
        zero = torch.zeros(len(z0), device=z0.device)
        return PathSample(z0, masked, batch["attention_mask"], zero, batch["input_ids"], batch["response_mask"])

    def sample(self, batch: dict[str, Tensor], masked: Tensor, s: Tensor, generator: Generator) -> PathSample:
        """A point of each row's line at time s (B,), with fresh noise."""
        x0 = batch["input_ids"]
        clean = self.embed(x0)
        on_line = line_point(self.start(x0, masked, generator), clean, s.unsqueeze(-1).expand(masked.shape))
        z = torch.where(masked.unsqueeze(-1), on_line, clean)
        return PathSample(z, masked, batch["attention_mask"], s, x0, batch["response_mask"])

    # -- from a point to another one --------------------------------------------------------------------------------

    def expected(self, psi: Tensor) -> Tensor:
        """ψ E, the mean embedding of distributions (..., V) -> (..., D), in the table's precision."""
        with without_autocast(psi):
            return psi.to(self.embedding.dtype) @ self.embedding

    def velocity(self, sample: PathSample, d: Tensor) -> Tensor:
        """dz/ds (B, L, D) along the flow of D_s (M, V); 0 at positions that are not masked."""
        z, masked = sample.z, sample.masked
        drift = torch.zeros_like(z)
        drift[masked] = velocity(z[masked], self.expected(d), sample.s[row_of_masked(masked)]).to(z.dtype)
        return drift

    def move(self, sample: PathSample, psi: Tensor, t: Tensor) -> PathSample:
        """X_{s,t}: the sample at time t, like s (B,) or (1,), with ψ_{s,t} (M, V)."""
        z, masked = sample.z, sample.masked
        s, end = (time.unsqueeze(-1).expand(masked.shape)[masked] for time in (sample.s, t))
        moved = z.clone()
        moved[masked] = flow_map(z[masked], self.expected(psi), s, end).to(z.dtype)
        return sample._replace(z=moved, s=t)

    def renoise(self, sample: PathSample, psi: Tensor, t: Tensor, generator: Generator | None) -> PathSample:
        """The sample at time t (1,) on the line from fresh noise to the expected embedding of ψ (M, V)."""
        z, masked = sample.z, sample.masked
        fresh = self.start(sample.x0, masked, generator)[masked]
        moved = z.clone()
        moved[masked] = line_point(fresh, self.expected(psi), t).to(z.dtype)
        return sample._replace(z=moved, s=t)

    # -- from a point to its text -----------------------------------------------------------------------------------

    def gain(self, s: Tensor) -> Tensor:
        """c_s of `wiener_gain`, (B,): the weight of z_s - m as an estimate of E_x - m."""
        return wiener_gain(s, self.noise_scale, self.spread)

    def own_token(self, z: Tensor, s: Tensor, *, blend: bool = False) -> Tensor:
        """The mean embedding of each position's token, given its own noise alone (`certain_mean`): (N, D), (N,) -> (N, D).

        Where the token is not certain, it is the mask, or with `blend` the linear estimate m + c_s (z - m) of `gain`.
        """
        mask, embedding = (at_least_float32(part) for part in (self.mask_embedding, self.embedding))
        z, s = z.to(embedding.dtype), s.to(embedding.dtype).clamp(max=NEARLY_CLEAN)

        def read(z: Tensor, s: Tensor) -> Tensor:
            otherwise = mask + self.gain(s).unsqueeze(-1) * (z - mask) if blend else mask
            return certain_mean(token_evidence(z, mask, embedding, s, self.noise_scale), otherwise, embedding)

        with without_autocast(z):
            parts = zip(z.split(POSITIONS_AT_ONCE), s.split(POSITIONS_AT_ONCE), strict=True)
            return torch.cat([read(*part) for part in parts])

    def evidence(self, z: Tensor, s: Tensor) -> Tensor:
        """log p(z_s | token) of every token at noisy positions, up to a constant: (..., D), (...) -> (..., V) float64."""
        mask, embedding = self.mask_embedding.double(), self.embedding.double()
        return token_evidence(z.double(), mask, embedding, s.double(), self.noise_scale)

    @torch.no_grad()
    def token_posterior(self, sample: PathSample, texts: Tensor) -> Tensor:
        """p(token | z_s) at the masked positions, (M, V), if the text is one of texts (N, L) that have the row's prompt."""
        z, masked, s, x0 = sample.z, sample.masked, sample.s, sample.x0
        alike, used = same_prompt(x0, masked, texts), masked.any(0)
        possible = alike.any(0)  # neither other texts nor positions of the prompt need products
        mask = at_least_float32(self.mask_embedding)
        apart = (z[:, used] - mask).to(mask.dtype)
        with without_autocast(z):
            evidence = [
                text_evidence(apart, masked[:, used], self.embed(few).to(mask.dtype) - mask, s, self.noise_scale)
                for few in texts[possible][:, used].split(TEXTS_AT_ONCE)
            ]
        shares = text_posterior(torch.cat(evidence, 1), alike[:, possible])
        return token_posterior(shares, texts[possible][:, used], masked[:, used], len(self.embedding))
