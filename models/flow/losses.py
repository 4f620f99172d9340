"""The three things a noisy-mask student learns: to read noisy masks, to jump over intervals, to land where the flow ends.

Each function takes a batch and returns `Terms`. `average` and `denoiser` are evaluations of the student with other weights:
its running average, and the frozen snapshot D that the first stage left (never the student itself, whose own D would make
the identities hold for any ψ).
Legend: B batch, L length, M masked positions, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.backbones.llada import LladaModel
from models.flow.flow_intervals import Intervals
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.solver import Network
from models.functional.flow_times import sample_data_interval
from models.functional.jvp import JvpBackend, value_and_jvp
from models.functional.masked_diffusion import antithetic_times, mask_tokens, row_of_masked
from models.functional.noisy_mask import (
    distribution_divergence,
    gap_weight,
    line_point,
    noisy_meanflow_target,
    psd_target,
    velocity,
)
from models.interfaces.objective import Terms, mean_of

LATEST = 0.98  # where an interval may begin: the velocity's 1/(1 - s) is still tame
FlowTarget = Literal["psd", "meanflow"]


def hide_response(batch: dict[str, Tensor], observed_share: float, generator: Generator) -> Tensor:
    """Masked positions (B, L): the whole response, but in `observed_share` of the rows only a random part of it."""
    response = batch["response_mask"]
    partly, p = torch.rand(2, len(response), generator=generator, device=response.device)
    p = torch.where(partly < observed_share, p, 1.0)
    return mask_tokens(batch["input_ids"], response, p, 0, generator)[1]


def noisy_point(
    student: NoisyMaskStudent, batch: dict[str, Tensor], masked: Tensor, s: Tensor, generator: Generator
) -> Tensor:
    """z_s (B, L, D): on the line where masked, the token's embedding elsewhere. s (B,)."""
    clean = student.base.embed(batch["input_ids"])
    on_line = line_point(student.start(batch, masked, generator), clean, s.unsqueeze(-1).expand(masked.shape))
    return torch.where(masked.unsqueeze(-1), on_line, clean)


def adapt_to_noise(
    student: NoisyMaskStudent,
    teacher: LladaModel,
    batch: dict[str, Tensor],
    generator: Generator,
    *,
    teacher_weight: float,
    observed_share: float,
    texts: Tensor | None = None,
) -> Terms:
    """Stage A: CE(x, ψ_{s,s}(z_s)) on masked positions + teacher_weight KL(teacher || ψ_{0,0}) on an eighth of the rows.

    texts (N, L): ids of further texts of the corpus, the batch's own among them. x is then averaged over those that could lie
    behind z_s, see `token_posterior`.
    """
    x0, attention_mask = batch["input_ids"], batch["attention_mask"]
    # 1. a time for each row and its point on the line
    masked = hide_response(batch, observed_share, generator)
    s = student.warp(antithetic_times(len(x0), generator, x0.device))
    z = noisy_point(student, batch, masked, s, generator)
    points, counting = (z, masked, attention_mask, s), int(masked.sum())
    # 2. an eighth of the rows again at s = 0, in the same forward
    if teacher_weight:
        few = {name: column[::8] for name, column in batch.items()}
        hidden = masked[::8]
        start = (student.start(few, hidden, generator), hidden, few["attention_mask"], torch.zeros_like(s[::8]))
        points = tuple(torch.cat(both) for both in zip(points, start, strict=True))
    logits = student(*points, points[-1])
    # 3. the denoiser's cross entropy, of each text by its share in what may lie behind z_s
    denoised = logits[:counting]
    tokens = x0[masked] if texts is None else student.token_posterior(z, masked, s, x0, texts)
    nll = mean_of(F.cross_entropy(denoised, tokens, reduction="none"))
    accuracy = mean_of((denoised.detach().argmax(-1) == x0[masked]).float())
    raw = {"denoising_nll": nll, "denoising_accuracy": accuracy}
    if not teacher_weight:
        return Terms(nll, raw)
    # 4. at s = 0 every ε must give the masked teacher's posterior
    with torch.no_grad():
        xt = torch.where(hidden, teacher.mask_id, few["input_ids"])
        posterior = teacher.lm_head(teacher.hidden(teacher.embed(xt), few["attention_mask"])[hidden]).softmax(-1)
    raw["teacher_gap"] = mean_of(distribution_divergence(posterior, logits[counting:]))
    return Terms(nll + teacher_weight * raw["teacher_gap"], raw)


def match_flow_map(
    student: NoisyMaskStudent,
    average: Network,
    denoiser: Network,
    batch: dict[str, Tensor],
    generator: Generator,
    *,
    widest: float,
    diagonal_share: float,
    endpoint_share: float,
    observed_share: float,
    weighted: bool,
    target: FlowTarget = "psd",
    meanflow_until: float = 0.95,
    rho_min: float = 0.05,
    jvp_backend: JvpBackend = "forward_ad",
    jvp_step: float = 1e-2,
) -> Terms:
    """Stage B: ψ_{s,t} against its target, and ψ_{s,s} against D_s on the diagonal rows.

    target: `psd` for every interval, or `meanflow` for those that end by `meanflow_until` and `psd` beyond.
    How many rows are of which kind may be drawn by lot. A kind without rows is computed for one that does not count, so that
    every rank takes the same forwards.
    """
    x0, attention_mask = batch["input_ids"], batch["attention_mask"]
    # 1. intervals: the diagonal first, then those for the derivative, then those for self-distillation
    q = sample_data_interval(
        len(x0), generator, x0.device, diagonal_share=diagonal_share, endpoint_share=endpoint_share, widest=widest
    )
    s, u, t = (student.warp(times) for times in q[:3])
    s = s.clamp(max=LATEST)
    u, t = torch.maximum(u, s), torch.maximum(t, s)
    n_diagonal, n_derivative = q[3], 0
    if target == "meanflow":
        early = (t <= meanflow_until) & (torch.arange(len(t), device=t.device) >= n_diagonal)
        n_derivative = int(early.sum())
        order = torch.cat([torch.arange(n_diagonal, device=t.device), *_split(early, n_diagonal)])
        s, u, t = s[order], u[order], t[order]
    masked = hide_response(batch, observed_share, generator)
    z = noisy_point(student, batch, masked, s, generator)
    cut = n_diagonal + n_derivative

    def part(first: int, last: int) -> tuple[Tensor | int, ...]:
        rows = slice(first, last) if first < last else slice(0, 1)
        counting = int(masked[first:last].sum())
        return z[rows], masked[rows], attention_mask[rows], s[rows], u[rows], t[rows], counting

    logits, targets = [], []
    # 2. diagonal rows: D itself
    if diagonal_share:
        zd, md, ad, sd, _, _, counting = part(0, n_diagonal)
        logits.append(student(zd, md, ad, sd, sd)[:counting])
        with torch.no_grad():
            targets.append(denoiser(zd, md, ad, sd, sd).softmax(-1)[:counting])
    # 3. the corrected mean-flow identity, with the derivative along the flow of D
    if target == "meanflow":
        zf, mf, af, sf, _, tf, counting = part(n_diagonal, cut)
        row = row_of_masked(mf)
        with torch.no_grad():
            log_d = denoiser(zf, mf, af, sf, sf).log_softmax(-1)
            drift = torch.zeros_like(zf)
            drift[mf] = velocity(zf[mf], student.expected(log_d.exp()), sf[row]).to(zf.dtype)
        value, derivative = value_and_jvp(
            lambda point, start: student(point, mf, af, start, tf),
            (zf, sf),
            (drift, torch.ones_like(sf)),
            backend=jvp_backend,
            step=jvp_step,
        )
        logits.append(value[:counting])
        targets.append(noisy_meanflow_target(log_d, value, derivative, sf[row], tf[row], rho_min)[:counting])
    # 4. two shorter jumps of the average in place of one
    if diagonal_share < 1:
        zp, mp, ap, sp, up, tp, counting = part(cut, len(x0))
        with torch.no_grad():
            targets.append(two_jumps(student, average, zp, mp, ap, sp, up, tp)[:counting])
        logits.append(student(zp, mp, ap, sp, tp)[:counting])
    # 5. the divergence, raw and weighted
    logits, targets = torch.cat(logits), torch.cat(targets)
    gap = distribution_divergence(targets, logits)
    loss = mean_of(gap * gap_weight(targets, logits)) if weighted else mean_of(gap)
    on_diagonal = int(masked[:n_diagonal].sum())
    return Terms(loss, {"diagonal_gap": mean_of(gap[:on_diagonal]), "flow_gap": mean_of(gap[on_diagonal:])})


def two_jumps(
    student: NoisyMaskStudent,
    network: Network,
    z: Tensor,
    masked: Tensor,
    attention_mask: Tensor,
    s: Tensor,
    u: Tensor,
    t: Tensor,
) -> Tensor:
    """What the network says of the jump from s to t when it makes it by way of u: distributions (M, V)."""
    row = row_of_masked(masked)
    psi_su = network(z, masked, attention_mask, s, u).softmax(-1)
    moved = student.move(z, masked, psi_su, s, u)
    psi_ut = network(moved, masked, attention_mask, u, t).softmax(-1)
    return psd_target(psi_su, psi_ut, s[row], u[row], t[row])


@torch.no_grad()
def consistency_gap(student: NoisyMaskStudent, rows: dict[str, Tensor], generator: Generator) -> Tensor:
    """KL(two jumps by way of s = 1/2 || one jump) from fresh noise to text, nats per position."""
    masked, attention_mask = rows["response_mask"], rows["attention_mask"]
    zero = torch.zeros(len(masked), device=masked.device)
    z = student.start(rows, masked, generator)
    target = two_jumps(student, student, z, masked, attention_mask, zero, zero + 0.5, zero + 1)
    return mean_of(distribution_divergence(target, student(z, masked, attention_mask, zero, zero + 1)))


def polish_endpoint(
    student: NoisyMaskStudent, z0: Tensor, masked: Tensor, attention_mask: Tensor, endpoint: Tensor
) -> Terms:
    """Stage C: CE(x̂, ψ_{0,1}(z_0)) on pairs of a start and the text x̂ (B, L) where its flow ends."""
    zero = torch.zeros(len(z0), device=z0.device)
    logits = student(z0, masked, attention_mask, zero, zero + 1)
    nll = mean_of(F.cross_entropy(logits.float(), endpoint[masked], reduction="none"))
    hits = torch.ones_like(masked)
    hits[masked] = logits.detach().argmax(-1) == endpoint[masked]
    return Terms(nll, {"endpoint_nll": nll, "endpoint_match": hits.all(-1).float().mean()})


def match_intervals(student: NoisyMaskStudent, intervals: Intervals) -> Terms:
    """KL(ψ_{s,t} of a flow that was followed || ψ_{s,t}) over all masked positions, nats a position."""
    logits = student(*intervals.points, intervals.s, intervals.t)
    gap = mean_of(distribution_divergence(intervals.psi, logits))
    return Terms(gap, {"interval_gap": gap})


def _split(early: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Indices from `first` on: those that are early, then the others."""
    index = torch.arange(len(early), device=early.device)
    return index[early], index[~early & (index >= first)]
