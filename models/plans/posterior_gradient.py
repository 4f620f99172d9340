"""The gradient with which a training step teaches the posterior which concepts to choose.

It is taken at the hidden states that the choices are made from, whatever the sampler. Where plans are drawn it is the gradient
of the losses that read a plan's block: text, bag of words, signals. Usage, rate and commitment reach the states another way and
do not count. Where plans are searched it is the gradient of the posterior's NLL. The prior's loss is in neither.
Legend: B batch, C columns of a plan's block, n slots, D width.
"""

import torch
from torch import Tensor

from models.plans.planner import Plan


class PosteriorGradient:
    """Collects the gradients of a step's backward passes: sum over rows of the L2 norm of each row's gradient.

    Losses are means over rows, so that this is a mean over the rows' own losses, whatever the size of the batch.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def take(self) -> Tensor | None:
        """What was collected since the last call; None where no posterior chose with a gradient."""
        total, self.total = self.total, None
        return total

    def watch_plan(self, plan: Plan) -> None:
        """Collect what reaches the states behind a drawn plan from its block, which executor and heads read."""
        if not plan.rounds or not plan.embeds.requires_grad:
            return

        def collect(gradient: Tensor) -> None:  # (B, C, D), before anything behind the block gets a gradient
            parts = []
            for columns, states, moved in plan.rounds:
                reaching = gradient[:, columns].to(moved.dtype)
                # retain_graph: the backward pass that this is called from comes here as well
                own = torch.autograd.grad(moved, states, reaching, retain_graph=True, allow_unused=True)[0]
                parts.append(torch.zeros_like(states) if own is None else own)
            self._add(torch.cat(parts, 1))

        self._begin(plan.embeds)
        plan.embeds.register_hook(collect)

    def watch_states(self, states: Tensor) -> None:
        """Collect what reaches the states (B, n, D) that the logits of given choices are computed from."""
        if states.requires_grad:
            self._begin(states)
            states.register_hook(self._add)

    def _begin(self, like: Tensor) -> None:
        """0 until a gradient comes: a hook is never called where none does."""
        if self.total is None:
            self.total = torch.zeros((), device=like.device)

    def _add(self, gradient: Tensor) -> None:
        self.total = self.total + gradient.detach().float().flatten(1).norm(dim=1).sum()
