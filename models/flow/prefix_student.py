"""The one-step student: a frozen masked diffusion LM with a soft prompt that is a function of the interval (r, t).

The frozen base is the teacher itself, one copy in memory.
"""

from torch import Tensor

from models.backbones.llada import LladaModel
from models.backbones.masked_from_causal import require_prefix
from models.flow.soft_prompt import SoftPrompt
from models.flow.student import Student
from models.functional.flow_times import check_interval


class PrefixStudent(Student):
    """u(x_t, r, t): logits averaged over [r, t], from a frozen base with a trainable prefix."""

    def __init__(self, base: LladaModel, *, prompt_length: int = 16, hidden_size: int = 256, rank: int = 32) -> None:
        sizes = {"prompt_length": prompt_length, "hidden_size": hidden_size, "rank": rank}
        super().__init__(base, **sizes)
        require_prefix(base)
        self.soft_prompt = SoftPrompt(base.config, **sizes)

    def hidden(
        self, embeds: Tensor, attention_mask: Tensor, r: Tensor, t: Tensor, response_mask: Tensor | None = None
    ) -> Tensor:
        """(B, L, D), (B, L) bool, (B,), (B,), (B, L) bool -> (B, L, D)"""
        return self.base.hidden(embeds, attention_mask, self.soft_prompt(r, t), response_mask)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, r: Tensor, t: Tensor, response_mask: Tensor | None = None
    ) -> Tensor:
        """(B, L) ids and their interval -> (B, L, V) logits. Raises UsageError unless 0 <= r <= t <= 1."""
        check_interval(r, t)
        return self.base.lm_head(self.hidden(self.base.embed(input_ids), attention_mask, r, t, response_mask))

    def project_weights(self) -> None:
        self.soft_prompt.project_weights()
