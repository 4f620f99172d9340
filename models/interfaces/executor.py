"""What turns a plan into text, whatever the plan is and however the text is generated.

Legend: B batch, C columns of a plan, D width of a hidden state, R text columns, V text vocabulary.
"""

from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from models.functional.next_token import EndIds
from models.interfaces.decoder import TokenCallback


@runtime_checkable
class Executor(Protocol):
    """A model of texts that is conditioned on a plan alone, never on the prompt that the plan was made for.

    A plan is its choices plan_ids (B, C) int64 and the embeddings plan_embeds (B, C, D) that are read; a relaxed plan has
    embeddings that are no row of a table, so that gradients reach the planner.
    """

    def logits(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, blank: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of each token of text (B, R), given the plan and the tokens before it.

        blank (B, R) bool: tokens that are hidden from the positions after them, which then depend on the plan.
        """
        ...

    def generate(
        self,
        plan_ids: Tensor,
        plan_embeds: Tensor,
        length: int,
        generator: Generator,
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        end_ids: EndIds = None,
        on_tokens: TokenCallback | None = None,
    ) -> Tensor:
        """Texts (B, length) of the plans; the most probable tokens at temperature 0.

        generator: of every random draw. vocab_size: ids from there on are padding of the output layer and never generated.
        end_ids: each ends a text, and the first of them fills what is beyond. on_tokens: see `Decoder`.
        """
        ...
