"""What every student has: a frozen base, which is its teacher, and an adapter that trains."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from models.backbones.frozen_layers import freeze
from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import MaskedFromCausal, require_merged
from models.functional.weights import snapshot


class Student(nn.Module):
    """A frozen base with weights that train beside it. The base is also the teacher: one copy is in memory.

    options: arguments of the constructor, plain types. A saved student is built from them again.
    """

    def __init__(self, base: LladaModel, **options: Any) -> None:
        super().__init__()
        if isinstance(base, MaskedFromCausal):
            require_merged(base)
        self.options = options
        self.base = freeze(base)

    def project_weights(self) -> None:
        """Called after every optimizer step: weights with a limited range are put back into it."""

    def trainable(self) -> dict[str, Tensor]:
        """Copies of the weights that train, by name. `with_weights` takes them."""
        return snapshot(self)

    def with_weights(self, weights: dict[str, Tensor], *args: Any) -> Tensor:
        """`forward(*args)` with other values of the trainable weights, such as an average; the student does not change."""
        return functional_call(self, weights, args)

    def train(self, mode: bool = True) -> "Student":
        """The base stays in evaluation mode whatever the trainer asks for."""
        super().train(mode)
        self.base.eval()
        return self
