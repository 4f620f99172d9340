"""The autoregressive executor p(x | z): it reads [<BOS>, plan, <TEXT>] and the text so far, never the prompt.

Legend: B batch, C columns of a plan's block, R text columns, D width, V text vocabulary.
"""

import torch
from torch import Generator, Tensor

from models.functional.bits_per_byte import token_nll
from models.functional.errors import UsageError
from models.functional.gumbel import sample_categorical
from models.functional.next_token import EndIds, are_ends, generated_until_end, until_end
from models.functional.uniform import uniform
from models.interfaces.decoder import TokenCallback
from models.plans.executor_columns import opening, text_columns
from models.plans.layout import joined
from models.plans.unified import Reading, UnifiedModel


class AutoregressiveExecutor:
    """Scores and generates text given a plan, with a shared `UnifiedModel`; it has no weights of its own.

    end_ids: the tokens that end a text. padding: whether the columns past the first of them count, which end tokens fill.
    """

    refines = False
    suffix = ""

    def __init__(self, model: UnifiedModel, end_ids: EndIds = None) -> None:
        self.model, self.layout, self.end_ids, self.padding = model, model.layout, end_ids, True

    def refining(self, refinements: int) -> "AutoregressiveExecutor":
        """Errors: UsageError for any number but 0: what was written stays."""
        if refinements:
            raise UsageError(f"module.refinements={refinements} redraws tokens; type module.executor=parallel")
        return self

    def forwards(self, length: int) -> int:
        """One a token."""
        return length

    def logits(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, blank: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of each token of text (B, R) given the plan and the tokens before it.

        blank (B, R) bool: tokens that are read as <BLANK>, so that the tokens after them have to come from the plan. None: no
        token.
        """
        # 1. the plan
        embeds, columns = opening(self.model, plan_ids, plan_embeds)
        # 2. all tokens but the last, some of them blank
        read = text if blank is None else text.masked_fill(blank, self.layout.vocabulary.blank)
        tokens = text_columns(self.model, read[:, :-1])
        # 3. each token from the column before it
        states = self.model.states(torch.cat([embeds, tokens[0]], 1), joined(columns, tokens[1]))
        return self.model.text_logits(states[:, embeds.shape[1] - 1 :])

    def nll(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor) -> Tensor:
        """-log p(x_l | z, x_<l) in nats, (B, R), 0 where a column does not count."""
        nll = token_nll(self.logits(plan_ids, plan_embeds, text), text)
        return nll.masked_fill(~self._counted(text), 0.0)

    def nll_of_pairs(self, plan_ids: Tensor, plan_embeds: Tensor, texts: Tensor) -> Tensor:
        """-log p(text | plan) of every text (N, R) given every plan (Z, C), (N, Z): a pass of all texts a plan."""
        plans = zip(plan_ids, plan_embeds, strict=True)
        rows = len(texts)
        found = [self.nll(ids.expand(rows, -1), embeds.expand(rows, -1, -1), texts).sum(-1) for ids, embeds in plans]
        return torch.stack(found, -1)

    def training_nll(
        self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, hidden: float, generator: Generator
    ) -> Tensor:
        """Nats of each text over the mean count of this batch, (B,): the batch's mean is nats a counted token.

        Each token is hidden from those after it with probability `hidden`.
        """
        blank = uniform(*text.shape, generator=generator) < hidden
        nll, counted = token_nll(self.logits(plan_ids, plan_embeds, text, blank), text), self._counted(text)
        return nll.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).to(nll.dtype).mean()

    def tokens_of(self, text: Tensor) -> Tensor:
        return self._counted(text).sum(-1)

    def _counted(self, text: Tensor) -> Tensor:
        """The columns of text (B, R) that count, (B, R) bool."""
        return until_end(text, self._ends)

    @property
    def _ends(self) -> EndIds:
        """What ends a text; None where every column counts."""
        return None if self.padding else self.end_ids

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
        """Texts (B, length) of plans, one forward pass a token; greedy at temperature 0.

        vocab_size: ids from there on are padding of the output layer and never generated. end_ids: each ends a text, and the
        first of them fills what is beyond; None: those of the executor where padding does not count, else none, and what the
        model generates beyond stays. on_tokens: see `Decoder`.
        """
        end_ids = self._ends if end_ids is None else end_ids
        reading, tokens = Reading(self.model), list[Tensor]()
        ended = torch.zeros(len(plan_ids), dtype=torch.bool, device=plan_ids.device)
        states = reading.read(*opening(self.model, plan_ids, plan_embeds))
        for position in range(length):
            logits = self.model.text_logits(states[:, -1])[:, :vocab_size]
            tokens.append(sample_categorical(logits, temperature, generator))
            if on_tokens is not None:
                on_tokens(generated_until_end(tokens, end_ids))
            ended |= are_ends(tokens[-1], end_ids)
            if position + 1 == length or bool(ended.all()):
                break
            states = reading.read(*text_columns(self.model, tokens[-1].unsqueeze(-1), position))
        return generated_until_end(tokens, end_ids, length)
