"""Generation along the noisy-mask flow: fresh noise, N forwards, a text.

Legend: B batch, L length, M masked positions, R response columns, V vocabulary. Times are data times, 1 = clean text.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.functional.errors import UsageError, require_choice
from models.functional.noisy_mask import line_point, second_order_step
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback

FewStep = Literal["chain", "renoise"]  # how a student answers; the flow itself is the denoiser's
Step = Literal[FewStep, "ode"]
Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class NoisyRows(NamedTuple):
    """What a network of the flow reads: points z (B, L, D), masked (B, L) bool, attention_mask (B, L) bool."""

    z: Tensor
    masked: Tensor
    attention_mask: Tensor


class FlowStep(NamedTuple):
    """One step of a flow: from z (B, L, D) at s to t (1,), with D_s and the step's ψ_{s,t} (M, V)."""

    z: Tensor
    s: Tensor
    t: Tensor
    d: Tensor
    psi: Tensor


def start_rows(student: NoisyMaskStudent, rows: dict[str, Tensor], generator: Generator) -> NoisyRows:
    """Rows at s = 0: every response position a noisy mask, prompts as they are."""
    masked = rows["response_mask"]
    return NoisyRows(student.start(rows, masked, generator), masked, rows["attention_mask"])


@torch.no_grad()
def follow_flow(
    student: NoisyMaskStudent,
    begin: NoisyRows,
    *,
    forwards: int,
    step: Step = "chain",
    promote: float | None = None,
    generator: Generator | None = None,
    network: Network | None = None,
    on_tokens: TokenCallback | None = None,
    path: Callable[[FlowStep], None] | None = None,
) -> Tensor:
    """Token ids (B, L) at the masked positions after `forwards` evaluations, 0 elsewhere; prompts are never touched.

    step:
      `chain`: X_{s,t} from each time of the grid to the next, then argmax ψ_{s,1}.
      `renoise`: the endpoint's expectation at every time of the grid, put back on the line with fresh noise.
      `ode`: second-order steps with the instantaneous ψ_{s,s}, exact as N grows: what one forward is trained to reproduce.
    promote: positions whose distribution has this much on one token become clean text for the forwards that follow.
    network: another evaluation than `student` itself, such as a snapshot of its weights. on_tokens: called with the tokens
    (B, L) after each of them. path: with step=ode, called with every step on the way; the last one's ψ_{s,1} is its tokens.
    """
    require_flow_options(step, promote, (forwards,))
    if path is not None and (step != "ode" or promote is not None):
        raise ValueError("a path is that of step=ode, with the same positions masked all along")
    network = network or student
    z, masked, attention_mask = begin
    tokens = torch.zeros(masked.shape, dtype=torch.long, device=z.device)
    grid = student.warp(torch.linspace(0, 1, forwards + 1, device=z.device))
    before = None  # D one step back
    for k in range(forwards):
        s, t = grid[k : k + 1], grid[k + 1 : k + 2]  # (1,): all rows are at the same time, and share one prefix
        target = {"chain": t, "renoise": torch.ones_like(t), "ode": s}[step]
        # 1. what every masked position becomes; the mask itself is never an answer
        logits = network(z, masked, attention_mask, s, target)
        logits[:, student.base.mask_id] = float("-inf")
        psi = torch.softmax(logits, -1)  # (M, V)
        tokens[masked] = psi.argmax(-1)
        if on_tokens is not None:
            on_tokens(tokens.clone())
        last, jump = k + 1 == forwards, psi
        if before is not None and not last:
            jump = second_order_step(psi, before, grid[k - 1 : k], s, t)
        if path is not None:
            path(FlowStep(z, s, t, psi, one_hot(tokens[masked], psi.shape[-1]).to(psi.dtype) if last else jump))
        if last:
            break
        # 2. move the masked positions to t
        if step == "renoise":
            fresh = student.start({"input_ids": tokens}, masked, generator)[masked]
            moved = z.clone()
            moved[masked] = line_point(fresh, student.expected(psi), t).to(z.dtype)
        else:
            moved = student.move(z, masked, jump, s, t)
        before = psi if step == "ode" else None
        # 3. sure positions become text
        if promote is not None:
            sure = torch.zeros_like(masked)
            sure[masked] = psi.max(-1).values >= promote
            moved = torch.where(sure.unsqueeze(-1), student.base.embed(tokens), moved)
            before = None if bool(sure.any()) else before  # D has changed for another reason than the flow
            masked = masked & ~sure
        z = moved
    return tokens


def require_flow_options(step: str, promote: float | None, forwards: tuple[int, ...]) -> None:
    """Raise UsageError, naming the option, for what `follow_flow` could not do."""
    if any(n < 1 for n in forwards):
        raise UsageError(f"forwards={list(forwards)} must be at least 1")
    require_choice("module.few_step", step, get_args(Step))
    if promote is not None and not 0.5 < promote <= 1.0:
        raise UsageError(f"module.promote={promote} must lie above 0.5 and at most at 1; null promotes nothing")


class NoisyMaskDecoder:
    """`follow_flow` from fresh noise, as a `Decoder`; the same seed gives the same texts."""

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
        self.student, self.forwards = student, forwards
        self.options = {"step": step, "promote": promote, "network": network}
        self.name = {"chain": "student", "renoise": "student, re-noised", "ode": "denoiser's flow"}[step]

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        begin, columns = start_rows(self.student, rows, generator), response_columns(rows["response_mask"])
        options = self.options | {"on_tokens": on_tokens and (lambda tokens: on_tokens(tokens[:, -columns:]))}
        tokens = follow_flow(self.student, begin, forwards=self.forwards, generator=generator, **options)
        return tokens[:, -columns:]
