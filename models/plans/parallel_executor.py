"""The parallel executor p(x | z): every token from one forward pass. It reads [<BOS>, plan, <TEXT>, masks], never the prompt.

It is the shared network read without a causal mask, as LLaDA reads (2502.09992): its Llama-shaped layers differ from a causal
LM's by the mask alone. So the plan's embeddings, the adapters and the exported folder are those of the other executor, and a
comparison of the two changes nothing but who sees whom.
Legend: B batch, C columns of a plan's block, R text columns, D width, V text vocabulary.
"""

import copy

import torch
from torch import Generator, Tensor

from models.functional.bits_per_byte import token_nll
from models.functional.gumbel import sample_categorical
from models.functional.masked_lm import any_order_weight
from models.functional.next_token import EndIds, as_end_ids, until_end
from models.functional.one_forward import hidden_tokens, least_certain, nll_of_texts, token_entropy
from models.functional.precision import at_least_float32
from models.interfaces.decoder import TokenCallback
from models.plans.executor_columns import opening, text_columns
from models.plans.layout import joined
from models.plans.unified import UnifiedModel


class ParallelExecutor:
    """Scores and generates text given a plan, with a shared `UnifiedModel`; it has no weights of its own.

    A text ends with its first end token, which is predicted like any other; the columns after it do not count, and are
    always read as masks. end_ids: the tokens that end a text; None: every column counts.
    refinements: further forward passes of a generation, under the same plan. redraw: share of a text's tokens that each of
    them draws again, the least certain ones.
    """

    refines = True

    def __init__(
        self, model: UnifiedModel, end_ids: EndIds = None, *, refinements: int = 0, redraw: float = 0.25
    ) -> None:
        self.model, self.layout, self.end_ids = model, model.layout, end_ids
        self.refinements, self.redraw = refinements, redraw

    def refining(self, refinements: int) -> "ParallelExecutor":
        """The same executor with another number of refinements."""
        other = copy.copy(self)
        other.refinements = refinements
        return other

    @property
    def suffix(self) -> str:
        return f", {self.refinements} refinement{'s' * (self.refinements > 1)}" if self.refinements else ""

    def forwards(self, length: int) -> int:
        """One, and one a refinement, whatever the length."""
        return 1 + self.refinements

    def logits(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, blank: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of each token of text (B, R) given the plan and the tokens that are not blank.

        blank (B, R) bool: tokens that are read as masks. None: all of them. A token that is read predicts itself; its logits
        mean nothing.
        """
        # 1. the plan
        embeds, columns = opening(self.model, plan_ids, plan_embeds)
        # 2. the text, masks where tokens are hidden
        mask = self.layout.vocabulary.blank
        read = torch.full_like(text, mask) if blank is None else text.masked_fill(blank, mask)
        tokens = text_columns(self.model, read)
        # 3. each token from its own column, which sees all others
        states = self.model.states(torch.cat([embeds, tokens[0]], 1), joined(columns, tokens[1]), bidirectional=True)
        return self.model.text_logits(states[:, embeds.shape[1] :])

    def nll(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor) -> Tensor:
        """-log p(x_l | z) in nats of one forward pass, (B, R); 0 after the first end token. Exact: no bound."""
        nll = token_nll(self.logits(plan_ids, plan_embeds, text), text)
        return nll.masked_fill(~until_end(text, self.end_ids), 0.0)

    def tokens_of(self, text: Tensor) -> Tensor:
        """All columns: how many there are is a part of what the executor reads."""
        return torch.full_like(text[:, 0], text.shape[1])

    def nll_of_pairs(self, plan_ids: Tensor, plan_embeds: Tensor, texts: Tensor) -> Tensor:
        """-log p(text | plan) of every text (N, R) given every plan (Z, C), (N, Z): each plan is read once for all texts."""
        nothing = texts.new_zeros(len(plan_ids), texts.shape[1])
        log_p = at_least_float32(self.logits(plan_ids, plan_embeds, nothing)).log_softmax(-1)  # (Z, R, V)
        return nll_of_texts(log_p, texts, until_end(texts, self.end_ids))

    def training_nll(
        self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, hidden: float, generator: Generator
    ) -> Tensor:
        """Nats a column (B,): the NLL of one forward pass in a share `hidden` of the rows, the any-order bound in the others.

        See `hidden_tokens` and `any_order_weight`.
        """
        counted = until_end(text, self.end_ids)
        chosen = hidden_tokens(counted, hidden, generator)
        nll = token_nll(self.logits(plan_ids, plan_embeds, text, chosen | ~counted), text)
        return (nll * chosen).sum(-1) * any_order_weight(counted, chosen.sum(-1)) / text.shape[1]

    @torch.no_grad()
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
        """Texts (B, length) of plans in `forwards` passes, fewer where no token is left to redraw; greedy at temperature 0.

        vocab_size: ids from there on are padding of the output layer and never generated. end_ids: as `end_ids` of the
        executor, None: these. The first of them fills what is beyond a text's end. on_tokens: see `Decoder`.
        """
        ends = self.end_ids if end_ids is None else end_ids
        fill = next(iter(as_end_ids(ends)), 0)
        text = torch.full((len(plan_ids), length), fill, device=plan_ids.device)
        entropies = torch.zeros(text.shape, device=text.device)
        hidden = torch.ones_like(text, dtype=torch.bool)
        for step in range(self.forwards(length)):
            # 1. all hidden tokens at once, given the plan and the others
            logits = self.logits(plan_ids, plan_embeds, text, hidden)[..., :vocab_size]
            text = torch.where(hidden, sample_categorical(logits, temperature, generator), text)
            entropies = torch.where(hidden, token_entropy(logits).to(entropies.dtype), entropies)
            counted = until_end(text, ends)
            if on_tokens is not None:
                on_tokens(text.masked_fill(~counted, fill))
            # 2. the next pass draws the least certain ones again; a text may become longer, so all after its end is hidden
            doubtful = least_certain(entropies, counted, self.redraw)
            if step + 1 == self.forwards(length) or not bool(doubtful.any()):
                break
            hidden = doubtful | ~counted
        return text.masked_fill(~counted, fill)
