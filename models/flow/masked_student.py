"""A student that is a masked diffusion LM itself: the frozen teacher and a trainable twin of it."""

from typing import Literal, get_args

from torch import Tensor

from models.backbones.llada import LladaModel
from models.backbones.twin import with_lora, with_own_weights
from models.flow.student import Student
from models.functional.errors import require_choice

Adapter = Literal["lora", "full"]


class MaskedStudent(Student):
    """adapter: `lora` (low-rank adapters on every linear layer) or `full` (a copy of all but the embedding table)."""

    def __init__(self, base: LladaModel, *, adapter: Adapter = "full", lora_rank: int = 16) -> None:
        require_choice("module.adapter", adapter, get_args(Adapter))
        super().__init__(base, adapter=adapter, lora_rank=lora_rank)
        self.body = with_lora(self.base, lora_rank) if adapter == "lora" else with_own_weights(self.base)

    def forward(
        self, xt: Tensor, masked: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None
    ) -> Tensor:
        """Logits at the masked positions: (B, L) ids, three times (B, L) bool -> (M, V)."""
        hidden = self.body.hidden(self.body.embed(xt), attention_mask, response_mask=response_mask)
        return self.body.lm_head(hidden[masked])
