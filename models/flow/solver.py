"""Generation along the noisy-mask flow: fresh noise, N forward passes, a text.

Legend: B batch, L length, M masked positions, R response columns, V vocabulary. Times are data times, 1 = clean text.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.path import NoisyMaskPath, PathSample
from models.functional.errors import UsageError, require_choice
from models.functional.noisy_mask import second_order_step
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback

FewStep = Literal["chain", "renoise", "refine"]  # how a student generates; `ode` is the denoiser's own flow
Step = Literal[FewStep, "ode"]
NAMES: dict[str, str] = {
    "chain": "student",
    "renoise": "student, re-noised",
    "refine": "student, refined",
    "ode": "denoiser's flow",
}
Network = Callable[[PathSample, Tensor], Tensor]  # a sample at s and a time t -> logits of ψ_{s,t} (M, V)


class FlowStep(NamedTuple):
    """One step of a flow: from a sample at s to t (1,), with D_s and the step's ψ_{s,t} (M, V)."""

    sample: PathSample
    t: Tensor
    d: Tensor
    psi: Tensor


@torch.no_grad()
def follow_flow(
    path: NoisyMaskPath,
    network: Network,
    start: PathSample,
    *,
    forwards: int,
    step: Step = "chain",
    promote: float | None = None,
    generator: Generator | None = None,
    on_tokens: TokenCallback | None = None,
    on_step: Callable[[FlowStep], None] | None = None,
) -> Tensor:
    """Token ids (B, L) at the masked positions after `forwards` evaluations, 0 elsewhere; prompts do not change.

    start: a sample at s = 0. step:
      `chain`: X_{s,t} from each time of the grid to the next, then argmax ψ_{s,1}.
      `renoise`: the endpoint's expectation at every time of the grid, put back on the line with fresh noise.
      `refine`: argmax ψ_{0,1} in every pass; the surest positions become text, the others start again from their own noise
        (posterior refinement, FMLM+, 2606.24773). As many become text as divides those that are left evenly among the passes.
      `ode`: second-order steps with the instantaneous ψ_{s,s}, exact as N grows: what one forward pass learns to reproduce.
    promote: positions with this much probability on one token become clean text for the following forward passes; with
      `refine` these beside its share.
    on_tokens: called with the tokens (B, L) after each forward pass. on_step: with step=ode, called with every step; the ψ
    of the last one is the distribution that has all its mass on the tokens.
    """
    require_flow_options(step, promote, (forwards,))
    if on_step is not None and (step != "ode" or promote is not None):
        raise ValueError("on_step needs step=ode without promote: the same positions have to stay masked")
    grid = path.warp(torch.linspace(0, 1, forwards + 1, device=start.z.device))
    sample = start._replace(s=grid[:1])  # (1,): all rows are at the same time, and share one prefix
    tokens = torch.zeros(sample.masked.shape, dtype=torch.long, device=start.z.device)
    before = None  # (time, D) one step back
    for k in range(forwards):
        s, t, last = sample.s, grid[k + 1 : k + 2], k + 1 == forwards
        # 1. the distribution of every masked token; the mask itself is never generated
        logits = network(sample, {"chain": t, "ode": s}.get(step, torch.ones_like(t)))
        logits[:, path.mask_id] = float("-inf")
        psi = torch.softmax(logits, -1)  # (M, V)
        tokens[sample.masked] = psi.argmax(-1)
        if on_tokens is not None:
            on_tokens(tokens.clone())
        # 2. the step's ψ_{s,t}
        jump = psi if before is None or last else second_order_step(psi, before[1], before[0], s, t)
        if on_step is not None:
            decided = one_hot(tokens[sample.masked], psi.shape[-1]).to(psi.dtype)
            on_step(FlowStep(sample, t, psi, decided if last else jump))
        if last:
            break
        # 3. the masked positions move to t, or stay where they are
        if step == "renoise":
            moved = path.renoise(sample, psi, t, generator)
        else:
            moved = sample if step == "refine" else path.move(sample, jump, t)
        before = (s, psi) if step == "ode" else None
        # 4. positions that are sure become text
        sure = torch.zeros_like(moved.masked)
        if promote is not None:
            sure[moved.masked] = psi.max(-1).values >= promote
        if step == "refine":
            sure |= surest(psi, moved.masked, forwards - k)
        if promote is not None or step == "refine":
            z = torch.where(sure.unsqueeze(-1), path.embed(tokens), moved.z)
            moved = moved._replace(z=z, masked=moved.masked & ~sure)
            before = None if bool(sure.any()) else before  # D has changed for another reason than the flow
        sample = moved
    return tokens


def surest(psi: Tensor, masked: Tensor, passes: int) -> Tensor:
    """The positions with most probability on one token, one in `passes` of each row's masked ones, rounded up: (B, L) bool.

    psi (M, V); masked (B, L) bool. This pass is one of `passes`.
    """
    confidence = torch.full(masked.shape, -1.0, dtype=psi.dtype, device=psi.device)
    confidence[masked] = psi.max(-1).values
    rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    count = (masked.sum(-1, keepdim=True) + passes - 1) // passes
    return masked & (rank < count)


def require_flow_options(step: str, promote: float | None, forwards: tuple[int, ...]) -> None:
    """Raise UsageError, naming the option, for what `follow_flow` could not do."""
    if any(n < 1 for n in forwards):
        raise UsageError(f"forwards={list(forwards)} must be at least 1")
    require_choice("module.few_step", step, get_args(Step))
    if promote is not None and not 0.5 < promote <= 1.0:
        raise UsageError(f"module.promote={promote} must lie above 0.5 and at most at 1; null promotes nothing")


class NoisyMaskDecoder:
    """`follow_flow` from fresh noise, as a `Decoder`; the same seed gives the same texts.

    network: another evaluation than `student` itself, such as a snapshot of its weights.
    """

    method = "student"
    refines = True

    def __init__(
        self,
        student: NoisyMaskStudent,
        forwards: int,
        *,
        step: Step = "chain",
        promote: float | None = None,
        network: Network | None = None,
    ) -> None:
        self.path, self.network, self.forwards = student.path, network or student, forwards
        self.options: dict[str, Any] = {"step": step, "promote": promote}
        self.name = NAMES[step]

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        start, columns = self.path.start_sample(rows, generator), response_columns(rows["response_mask"])
        options = self.options | {"on_tokens": on_tokens and (lambda tokens: on_tokens(tokens[:, -columns:]))}
        tokens = follow_flow(self.path, self.network, start, forwards=self.forwards, generator=generator, **options)
        return tokens[:, -columns:]
