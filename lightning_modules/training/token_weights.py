"""Micro-batches and ranks of different sizes weigh as many tokens as they have.

A trainer averages what it is given: with micro-batches i = 1..K of all ranks, each with a summed loss S_i over n_i tokens, the
gradient of an optimizer step is that of mean_i(S_i / n_i). Equal batches make this the mean over tokens; others need weights.
"""

import torch
import torch.distributed as dist
from torch.optim import Optimizer


class TokenWeights:
    r"""Makes the gradient of an optimizer step that of sum_i S_i / sum_i n_i.

    The loss of micro-batch i is multiplied by w_i = n_i / n, n the tokens of the step's first micro-batch (their mean over the
    ranks), so that with n_i = n nothing is changed; before the step the gradient, which is then that of
    sum_i w_i S_i / n_i / K, is multiplied by K n / sum_i n_i.
    """

    def __init__(self) -> None:
        self.first, self.tokens = 0.0, 0

    def weight(self, tokens: int, device: torch.device) -> float:
        """w_i of the next micro-batch; every rank has to call this."""
        if not self.first:
            self.first = _over_ranks(tokens, device) / _ranks()
        self.tokens += tokens
        return tokens / self.first if self.first else 0.0

    def finish(self, optimizer: Optimizer, batches: int, device: torch.device) -> None:
        """Scale the gradients of a step; batches: by how many micro-batches a rank's losses were divided."""
        tokens = _over_ranks(self.tokens, device)
        scale = batches * _ranks() * self.first / max(1, tokens)
        self.first, self.tokens = 0.0, 0
        if scale != 1:
            torch._foreach_mul_(
                [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None], scale
            )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_ranks(count: float, device: torch.device) -> float:
    """The sum of a number over all ranks."""
    if _ranks() == 1:
        return count
    total = torch.tensor(float(count), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()
