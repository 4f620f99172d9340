"""A student that is a masked diffusion LM itself: the frozen teacher and a trainable twin of it."""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.func import functional_call

from models.backbones.frozen_layers import freeze
from models.backbones.llada import LladaModel
from models.backbones.twin import with_lora, with_own_weights
from models.functional.errors import UsageError

Adapter = Literal["lora", "full"]


class MaskedStudent(nn.Module):
    """adapter: `lora` (low-rank adapters on every linear layer) or `full` (a copy of all but the embedding table)."""

    def __init__(self, base: LladaModel, *, adapter: Adapter = "full", lora_rank: int = 16) -> None:
        super().__init__()
        if adapter not in get_args(Adapter):
            raise UsageError(f"module.adapter={adapter} is not known; type one of {', '.join(get_args(Adapter))}")
        self.options = {"adapter": adapter, "lora_rank": lora_rank}
        self.base = freeze(base)
        self.body = with_lora(self.base, lora_rank) if adapter == "lora" else with_own_weights(self.base)

    def forward(self, xt: Tensor, masked: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits at the masked positions: (B, L) ids, (B, L), (B, L) -> (M, V)."""
        return self.body.lm_head(self.body.hidden(self.body.embed(xt), attention_mask)[masked])

    def project_(self) -> None:
        """Nothing constrains these weights."""

    def trainable(self) -> dict[str, Tensor]:
        """Copies of the weights that train, by name: a snapshot for `with_weights`."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def with_weights(self, weights: dict[str, Tensor], *args: Tensor) -> Tensor:
        """`forward(*args)` with other trainable weights; nothing is changed."""
        return functional_call(self, weights, args)

    def train(self, mode: bool = True) -> "MaskedStudent":
        super().train(mode)
        self.base.eval()
        return self
