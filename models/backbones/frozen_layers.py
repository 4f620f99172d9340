"""Layers with frozen weights whose forward-mode derivatives cost what they must.

Forward-mode differentiation of `x Wᵀ` in general is `ẋ Wᵀ + x Ẇᵀ`, and torch multiplies by a zero Ẇ where W is a constant;
for products of small tensors with constants it takes a slow path through Python. A frozen layer knows that Ẇ = 0. Its
derivative is not recorded for a later backward pass either, because `value_and_jvp` holds it constant: second derivatives
through these layers are not available.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from models.functional.precision import at_least_float32, to_autocast_dtype
from models.functional.weights import full_tensor


class _Linear(Function):
    """The weight may be split over ranks (`sharded_layers`): it is whole while it is multiplied by, and no longer."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, full_tensor(weight).to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ full_tensor(ctx.saved_tensors[0]).to(grad.dtype), None

    @staticmethod
    @torch.no_grad()
    def jvp(ctx, x_tangent: Tensor, _) -> Tensor:
        return F.linear(x_tangent, full_tensor(ctx.saved_tensors[0]).to(x_tangent.dtype))


class _RMSNorm(Function):
    """y = n w with n = x / rms(x); dn = (dx - n mean(dx n)) / rms(x), a symmetric map, so backward and jvp share it."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = at_least_float32(x)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        n = (wide * inverse).to(x.dtype)
        return weight * n, n, inverse.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, n, inverse = output
        ctx.mark_non_differentiable(n, inverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(n, inverse, inputs[1])
        ctx.save_for_forward(n, inverse, inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        n, inverse, weight = ctx.saved_tensors
        return _project(grad * weight, n, inverse), None, None

    @staticmethod
    @torch.no_grad()
    def jvp(ctx, x_tangent: Tensor, *_) -> tuple[Tensor, None, None]:
        n, inverse, weight = ctx.saved_tensors
        return _project(x_tangent, n, inverse) * weight, None, None


def _project(tangent: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    return (tangent - n * (tangent * n).mean(-1, keepdim=True)) * inverse


class _SwiGLU(Function):
    """silu(gate) up; no weights, but its general derivative records four more tensors of the widest kind."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _silu_slope(gate) * grad * up, grad * F.silu(gate)

    @staticmethod
    @torch.no_grad()
    def jvp(ctx, gate_tangent: Tensor, up_tangent: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors
        return _silu_slope(gate) * gate_tangent * up + F.silu(gate) * up_tangent


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


class FrozenLinear(nn.Linear):
    """`nn.Linear` with the same parameters and the same result, for weights that never train."""

    def forward(self, x: Tensor) -> Tensor:
        (x,) = to_autocast_dtype(x)
        y = _Linear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FrozenRMSNorm(LlamaRMSNorm):
    """transformers' norm, computed in float32 for half precision and in the input's own type otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)[0]


class FrozenMLP(LlamaMLP):
    """down(silu(gate(x)) up(x)); `freeze` has checked that the activation is silu."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def freeze(model: nn.Module) -> nn.Module:
    """Stop every gradient into the model's weights and give its layers the cheaper derivatives; in place.

    Layers keep their parameters, names and results; only their class changes, so nothing is copied.
    """
    model.requires_grad_(False)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear
        elif type(layer) is LlamaRMSNorm:
            layer.__class__ = FrozenRMSNorm
        elif type(layer) is LlamaMLP and isinstance(layer.act_fn, nn.SiLU | SiLUActivation):
            layer.__class__ = FrozenMLP
    return model.eval()
