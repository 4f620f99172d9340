"""What newer releases of torch do and 2.11 does not. Delete this file once 2.11 is no longer supported."""

from types import MethodType

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def let_checkpoints_pass_tangents() -> None:
    """Make `torch.utils.checkpoint` work under forward-mode derivatives.

    2.11 keeps the inputs of a checkpoint with an autograd.Function whose empty output has no forward derivative. Newer
    releases keep them without such a function.
    """
    saver = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
    if saver is not None and "jvp" not in vars(saver):
        saver.jvp = staticmethod(lambda ctx, *tangents: torch.zeros(0))


def reduce_unused_weights(part: FSDPModule) -> None:
    """Average every trained weight over ranks, those without a gradient on this rank as zeros.

    Ranks may use different weights in a step. Each must then send gradients of the same sizes.
    """
    if hasattr(part, "set_reduce_scatter_unused_params"):
        part.set_reduce_scatter_unused_params(True)
        return
    group = part._get_fsdp_state()._fsdp_param_group
    if group is None:  # all of its weights are frozen
        return
    reduce_used = group.post_backward

    def reduce_all(group, *unused: Tensor) -> None:
        for weight in (held._unsharded_param for held in group.fsdp_params if hasattr(held, "_unsharded_param")):
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        reduce_used(*unused)

    group.post_backward = MethodType(reduce_all, group)  # type: ignore[method-assign]  # of this object alone
