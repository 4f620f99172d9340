"""The three things a noisy-mask student learns: to read noisy masks, to jump over intervals, to reach the end of the flow.

Each function takes a batch and returns `Terms`. `average` and `denoiser` are evaluations of the student with other weights:
its running average, and the frozen snapshot D that the first stage left. The denoiser is never the student itself: with the
student's own D the identities would hold for any ψ.
Legend: B batch, L length, M masked positions, V vocabulary. Times are data times, s <= t, 1 = clean text.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.backbones.llada import LladaModel
from models.flow.flow_intervals import Intervals
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.options import NoisyMaskFlowOptions
from models.flow.path import NoisyMaskPath, PathSample, hide_response
from models.flow.solver import Network
from models.functional.flow_times import sample_data_interval
from models.functional.jvp import value_and_jvp
from models.functional.masked_diffusion import antithetic_times, row_of_masked
from models.functional.noisy_mask import distribution_divergence, gap_weight, noisy_meanflow_target, psd_target
from models.interfaces.objective import Terms, mean_of

LATEST = 0.98  # the latest start of an interval: the velocity has a factor 1/(1 - s)


# -- adapt ---------------------------------------------------------------------------------------------------------------


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

    texts (N, L): ids of more texts of the corpus, the batch's own among them. The target is then averaged over the texts
    that z_s may have been made from, see `NoisyMaskPath.token_posterior`.
    """
    path, x0 = student.path, batch["input_ids"]
    # 1. a time for each row and its point on the line
    masked = hide_response(batch, observed_share, generator)
    s = path.warp(antithetic_times(len(x0), generator, x0.device))
    sample, positions = path.sample(batch, masked, s, generator), int(masked.sum())
    # 2. an eighth of the rows again at s = 0, in the same forward pass
    both = sample
    if teacher_weight:
        few = {name: column[::8] for name, column in batch.items()}
        start = path.start_sample(few, generator, masked[::8])
        both = sample.followed_by(start)
    logits = student(both, both.s)
    # 3. the denoiser's cross entropy, against the own text or all possible ones
    denoised = logits[:positions]
    tokens = x0[masked] if texts is None else path.token_posterior(sample, texts)
    nll = mean_of(F.cross_entropy(denoised, tokens, reduction="none"))
    accuracy = mean_of((denoised.detach().argmax(-1) == x0[masked]).float())
    raw = {"denoising_nll": nll, "denoising_accuracy": accuracy}
    if not teacher_weight:
        return Terms(nll, raw)
    # 4. at s = 0 every ε must give the masked teacher's posterior
    raw["teacher_gap"] = mean_of(distribution_divergence(teacher_posterior(teacher, start), logits[positions:]))
    return Terms(nll + teacher_weight * raw["teacher_gap"], raw)


@torch.no_grad()
def teacher_posterior(teacher: LladaModel, sample: PathSample) -> Tensor:
    """p(token | the text around the masks) of the masked teacher, which sees ordinary masks: (M, V)."""
    xt = torch.where(sample.masked, teacher.mask_id, sample.x0)
    hidden = teacher.hidden(teacher.embed(xt), sample.attention_mask, response_mask=sample.response_mask)
    return teacher.lm_head(hidden[sample.masked]).softmax(-1)


# -- flow ----------------------------------------------------------------------------------------------------------------


class Cuts(NamedTuple):
    """Intervals [s, t] cut at u, (B,) each, in three groups: n_diagonal rows with s = t, then n_meanflow, then the rest."""

    s: Tensor
    u: Tensor
    t: Tensor
    n_diagonal: int
    n_meanflow: int


class FlowRows(NamedTuple):
    """Rows of one group: samples at s, the cuts u and the ends t (B,), and how many of their masked positions count."""

    sample: PathSample
    u: Tensor
    t: Tensor
    positions: int


class Match(NamedTuple):
    """Logits of the student and the distributions that they should give, (M, V) each."""

    logits: Tensor
    target: Tensor


def match_flow_map(
    student: NoisyMaskStudent,
    average: Network,
    denoiser: Network,
    batch: dict[str, Tensor],
    generator: Generator,
    options: NoisyMaskFlowOptions,
    *,
    widest: float,
) -> Terms:
    """Stage B: ψ_{s,t} against its target, and ψ_{s,s} against D_s on the diagonal rows.

    options.target: `psd` for every interval, or `meanflow` for those that end by `meanflow_until` and `psd` for the others.
    widest: the greatest length of an interval, in even times.
    """
    path = student.path
    # 1. an interval for each row, and a point where it begins
    x0 = batch["input_ids"]
    cuts = draw_cuts(path, len(x0), x0.device, generator, options, widest)
    masked = hide_response(batch, options.observed_share, generator)
    sample = path.sample(batch, masked, cuts.s, generator)
    first_jump, first_cut = cuts.n_diagonal, cuts.n_diagonal + cuts.n_meanflow
    matches = []
    # 2. diagonal rows: D itself
    if options.diagonal_share:
        matches.append(match_denoiser(student, denoiser, flow_rows(sample, cuts, 0, first_jump)))
    # 3. the corrected mean-flow identity, with the derivative along the flow of D
    if options.target == "meanflow":
        matches.append(match_meanflow(student, denoiser, flow_rows(sample, cuts, first_jump, first_cut), options))
    # 4. two shorter jumps of the average in place of one
    if options.diagonal_share < 1:
        matches.append(match_two_jumps(student, average, flow_rows(sample, cuts, first_cut, len(cuts.s))))
    # 5. the divergence, raw and weighted
    logits, target = (torch.cat(parts) for parts in zip(*matches, strict=True))
    gap = distribution_divergence(target, logits)
    loss = mean_of(gap * gap_weight(target, logits)) if options.weighted else mean_of(gap)
    on_diagonal = int(masked[:first_jump].sum())
    return Terms(loss, {"diagonal_gap": mean_of(gap[:on_diagonal]), "flow_gap": mean_of(gap[on_diagonal:])})


def draw_cuts(
    path: NoisyMaskPath,
    n: int,
    device: torch.device,
    generator: Generator,
    options: NoisyMaskFlowOptions,
    widest: float,
) -> Cuts:
    """Intervals of n rows, no longer than `widest`, in the order of their groups."""
    shares = {"diagonal_share": options.diagonal_share, "endpoint_share": options.endpoint_share}
    *times, n_diagonal = sample_data_interval(n, generator, device, widest=widest, **shares)
    s, u, t = (path.warp(time) for time in times)
    s = s.clamp(max=LATEST)
    u, t = torch.maximum(u, s), torch.maximum(t, s)
    if options.target != "meanflow":
        return Cuts(s, u, t, n_diagonal, 0)
    index = torch.arange(n, device=device)
    jumps = index >= n_diagonal
    early = jumps & (t <= options.meanflow_until)
    order = torch.cat([index[~jumps], index[early], index[jumps & ~early]])
    return Cuts(s[order], u[order], t[order], n_diagonal, int(early.sum()))


def flow_rows(sample: PathSample, cuts: Cuts, first: int, last: int) -> FlowRows:
    """Rows first to last. Where there are none, one row that does not count: every rank takes the same forward passes."""
    rows = slice(first, last) if first < last else slice(0, 1)
    return FlowRows(sample.rows(rows), cuts.u[rows], cuts.t[rows], int(sample.masked[first:last].sum()))


def match_denoiser(student: NoisyMaskStudent, denoiser: Network, rows: FlowRows) -> Match:
    """ψ_{s,s} = D_s."""
    sample = rows.sample
    logits = student(sample, sample.s)[: rows.positions]
    with torch.no_grad():
        target = denoiser(sample, sample.s).softmax(-1)[: rows.positions]
    return Match(logits, target)


def match_meanflow(
    student: NoisyMaskStudent, denoiser: Network, rows: FlowRows, options: NoisyMaskFlowOptions
) -> Match:
    """ψ_{s,t} = D_s / ρ, see `noisy_meanflow_target`; ρ needs the derivative of the student's logits along the flow of D."""
    sample, t = rows.sample, rows.t
    row = row_of_masked(sample.masked)
    with torch.no_grad():
        log_d = denoiser(sample, sample.s).log_softmax(-1)
        drift = student.path.velocity(sample, log_d.exp())
    logits, derivative = value_and_jvp(
        lambda z, s: student(sample._replace(z=z, s=s), t),
        (sample.z, sample.s),
        (drift, torch.ones_like(sample.s)),
        backend=options.jvp_backend,
        step=options.jvp_step,
    )
    target = noisy_meanflow_target(log_d, logits, derivative, sample.s[row], t[row], options.rho_min)
    return Match(logits[: rows.positions], target[: rows.positions])


def match_two_jumps(student: NoisyMaskStudent, average: Network, rows: FlowRows) -> Match:
    """ψ_{s,t} = what the average gives by way of u (`psd_target`)."""
    target = two_jumps(student.path, average, rows.sample, rows.u, rows.t)[: rows.positions]
    return Match(student(rows.sample, rows.t)[: rows.positions], target)


@torch.no_grad()
def two_jumps(path: NoisyMaskPath, network: Network, sample: PathSample, u: Tensor, t: Tensor) -> Tensor:
    """ψ_{s,t} of two jumps of the network, from s to u and from u to t; u, t (B,): distributions (M, V)."""
    row = row_of_masked(sample.masked)
    psi_su = network(sample, u).softmax(-1)
    psi_ut = network(path.move(sample, psi_su, u), t).softmax(-1)
    return psd_target(psi_su, psi_ut, sample.s[row], u[row], t[row])


@torch.no_grad()
def consistency_gap(student: NoisyMaskStudent, rows: dict[str, Tensor], generator: Generator) -> Tensor:
    """KL(two jumps by way of s = 1/2 || one jump) from fresh noise to text, nats per position."""
    start = student.path.start_sample(rows, generator)
    target = two_jumps(student.path, student, start, start.s + 0.5, start.s + 1)
    return mean_of(distribution_divergence(target, student(start, start.s + 1)))


# -- polish --------------------------------------------------------------------------------------------------------------


def polish_endpoint(student: NoisyMaskStudent, pairs: PathSample) -> Terms:
    """Stage C: CE(x̂, ψ_{0,1}(z_0)) on pairs of noise at s = 0 and the text x̂ = pairs.x0 where its flow ends."""
    masked, endpoint = pairs.masked, pairs.x0[pairs.masked]
    logits = student(pairs, pairs.s + 1)
    nll = mean_of(F.cross_entropy(logits.float(), endpoint, reduction="none"))
    hits = torch.ones_like(masked)
    hits[masked] = logits.detach().argmax(-1) == endpoint
    return Terms(nll, {"endpoint_nll": nll, "endpoint_match": hits.all(-1).float().mean()})


def match_intervals(student: NoisyMaskStudent, intervals: Intervals) -> Terms:
    """KL(ψ_{s,t} of a flow that was followed || ψ_{s,t}) over all masked positions, nats per position."""
    logits = student(intervals.begin, intervals.t)
    gap = mean_of(distribution_divergence(intervals.psi, logits))
    return Terms(gap, {"interval_gap": gap})
