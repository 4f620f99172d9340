"""Total derivatives along a direction, by forward-mode differentiation or by central differences."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from models.functional.errors import UsageError
from models.functional.precision import without_autocast

JvpBackend = Literal["forward_ad", "finite_difference"]


def value_and_jvp(
    fn: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    *,
    backend: JvpBackend = "forward_ad",
    step: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """fn(*primals), differentiable in fn's parameters, and its derivative along `tangents`, detached.

    `forward_ad` is exact: what `torch.func.jvp` computes, without its wrapping of every operation. Every operation of fn
    needs a forward-mode formula: flash attention and compiled layers have none. `finite_difference` is
    (fn(x + h v) - fn(x - h v)) / 2h under no_grad with error O(h²). It works with any kernel and takes three forward
    passes. If h is too small, float32 rounding dominates: 1e-2 suits logits of order 1-10.

    Both are computed in the precision of the primals: half precision would lose most digits of a derivative.
    """
    with without_autocast(primals[0]):
        return _value_and_jvp(fn, primals, tangents, backend, step)


def _value_and_jvp(
    fn: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    backend: JvpBackend,
    step: float,
) -> tuple[Tensor, Tensor]:
    if backend == "forward_ad":
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True)]
            value, derivative = forward_ad.unpack_dual(fn(*duals))
        return value, torch.zeros_like(value) if derivative is None else derivative.detach()
    if backend == "finite_difference":
        with torch.no_grad():
            ahead = fn(*(x + step * v for x, v in zip(primals, tangents, strict=True)))
            behind = fn(*(x - step * v for x, v in zip(primals, tangents, strict=True)))
        return fn(*primals), (ahead - behind) / (2 * step)
    raise UsageError(f"module.jvp_backend={backend} is not known; type forward_ad or finite_difference")
