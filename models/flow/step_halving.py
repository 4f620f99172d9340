"""Self-distillation through time: one step of the student does what two steps of its teacher do.

Deschenaux and Gulcehre, Beyond Autoregression: Fast LLMs via Self-Distillation Through Time (2024). The targets still
factorise over positions, so one forward pass cannot be better than the product of marginals: a baseline.
Legend: B batch, L length, M masked positions, V vocabulary. Times: t = 1 all masked.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from models.flow.masked_student import MaskedStudent
from models.functional.gumbel import sample_categorical
from models.functional.masked_diffusion import mask_tokens
from models.functional.noisy_mask import distribution_divergence
from models.interfaces.objective import Terms, mean_of

MaskedNetwork = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # `MaskedStudent.forward`


@torch.no_grad()
def two_step_target(
    teacher: MaskedNetwork,
    xt: Tensor,
    masked: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    t: Tensor,
    step: float,
    mask_id: int,
    generator: Generator,
) -> Tensor:
    """Distributions (M, V) at the masked positions of x_t after two steps of the teacher's sampler.

    A token's target is the teacher's distribution at the step that reveals it, or at the second step if neither does. At
    time t a masked token is revealed with probability step / t. t (B,).
    """
    pending, current = masked, xt
    collected: Tensor | None = None
    for k in range(2):
        logits = teacher(current, pending, attention_mask, response_mask)
        logits[:, mask_id] = float("-inf")
        p = torch.softmax(logits.float(), -1)
        if collected is None:
            collected = p.new_zeros(*masked.shape, p.shape[-1])
        collected[pending] = p
        time = (t - k * step).clamp(min=step).unsqueeze(-1)
        draw = torch.rand(masked.shape, generator=generator, device=xt.device)
        reveal = pending & (draw < step / time)
        drawn = torch.zeros_like(xt)
        drawn[pending] = sample_categorical(logits, 1.0, generator)
        current = torch.where(reveal, drawn, current)
        pending = pending & ~reveal
    assert collected is not None
    return collected[masked]


def halve_steps(
    student: MaskedStudent, teacher: MaskedNetwork, batch: dict[str, Tensor], step: float, generator: Generator
) -> Terms:
    """KL(two steps of size `step` || one forward pass of the student) at times 2 step, 4 step, ..., 1: the student's grid."""
    x0, mask_id = batch["input_ids"], student.base.mask_id
    attention_mask, response_mask = batch["attention_mask"], batch["response_mask"]
    # 1. a time at which the student takes a step, and the text there
    student_steps = round(1 / (2 * step))
    t = torch.randint(1, student_steps + 1, (len(x0),), generator=generator, device=x0.device) * (2 * step)
    xt, masked = mask_tokens(x0, response_mask, t, mask_id, generator)
    # 2. the distributions after two of the teacher's steps
    target = two_step_target(teacher, xt, masked, attention_mask, response_mask, t, step, mask_id, generator)
    # 3. the divergence of one forward pass from them
    gap = mean_of(distribution_divergence(target, student(xt, masked, attention_mask, response_mask)))
    return Terms(gap, {"halving_gap": gap})
