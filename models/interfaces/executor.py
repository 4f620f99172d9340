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
    end_ids: the tokens that end a text, known once the corpus is. refines: as of a `Decoder`. suffix: of a decoder's
    name.
    """

    end_ids: EndIds
    refines: bool

    @property
    def suffix(self) -> str: ...

    def refining(self, refinements: int) -> "Executor":
        """The same executor with so many passes that redraw tokens. Errors: UsageError where it has none."""
        ...

    def forwards(self, length: int) -> int:
        """Forward passes of a text of `length` tokens, at most."""
        ...

    def logits(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, blank: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of each token of text (B, R), given the plan and the tokens that are read before it is written.

        blank (B, R) bool: tokens that are hidden, so that others depend on the plan. None: as in `nll`.
        """
        ...

    def nll(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor) -> Tensor:
        """Nats of each token (B, R), 0 where a column does not count; their sum is -log p(text | plan), exactly."""
        ...

    def tokens_of(self, text: Tensor) -> Tensor:
        """How many tokens of text (B, R) figures in nats a token divide by, (B,)."""
        ...

    def nll_of_pairs(self, plan_ids: Tensor, plan_embeds: Tensor, texts: Tensor) -> Tensor:
        """-log p(text | plan) in nats of every text (N, R) given every plan (Z, C) and (Z, C, D), (N, Z)."""
        ...

    def training_nll(
        self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, hidden: float, generator: Generator
    ) -> Tensor:
        """The loss of each text in nats a counted token, (B,), with some of its tokens hidden; `hidden` says how many."""
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


def greedy_texts(executor: Executor, plan_ids: Tensor, plan_embeds: Tensor, length: int, vocab_size: int) -> Tensor:
    """The texts (B, length) of the most probable tokens below vocab_size, given plans."""
    unused = Generator(device=plan_ids.device)
    return executor.generate(plan_ids, plan_embeds, length, unused, temperature=0.0, vocab_size=vocab_size)
