"""What every student has: a frozen base, which is its teacher, and something on it that trains."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from models.backbones.frozen_layers import freeze
from models.backbones.llada import LladaModel
from models.functional.weights import snapshot


class Student(nn.Module):
    """base: one frozen copy in memory, teacher and base at once. options: what it is built again from, plain types."""

    def __init__(self, base: LladaModel, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.base = freeze(base)

    def project_(self) -> None:
        """Called after every optimizer step: put weights back into the range that they must keep."""

    def trainable(self) -> dict[str, Tensor]:
        """Copies of the weights that train, by name: a snapshot for `with_weights`."""
        return snapshot(self)

    def with_weights(self, weights: dict[str, Tensor], *args: Tensor) -> Tensor:
        """`forward(*args)` with other trainable weights, such as an average or an earlier snapshot; nothing is changed."""
        return functional_call(self, weights, args)

    def train(self, mode: bool = True) -> "Student":
        """The base stays in evaluation mode whatever the trainer asks for."""
        super().train(mode)
        self.base.eval()
        return self
