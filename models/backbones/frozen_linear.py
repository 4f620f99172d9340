"""Frozen linear layers whose forward-mode derivative costs one matrix product instead of two.

Forward-mode differentiation of `x Wᵀ` in general is `ẋ Wᵀ + x Ẇᵀ`, and torch multiplies by a zero Ẇ where W is a
constant. A frozen layer knows that Ẇ = 0.
"""

import torch
from torch import Tensor, nn


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, weight = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad_output @ weight, None

    @staticmethod
    def jvp(ctx, x_tangent: Tensor, _) -> Tensor:
        (weight,) = ctx.saved_tensors
        return torch.nn.functional.linear(x_tangent, weight)


class FrozenLinear(nn.Linear):
    """`nn.Linear` with the same parameters and the same result, for weights that never train."""

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenLinearFunction.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def freeze(model: nn.Module) -> nn.Module:
    """Stop every gradient into the model's weights and give its linear layers the cheaper derivative; in place."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                frozen = FrozenLinear(1, 1, bias=False, device="meta")
                frozen.in_features, frozen.out_features = layer.in_features, layer.out_features
                frozen.weight, frozen.bias = layer.weight, layer.bias
                setattr(parent, name, frozen)
    return model.eval()
