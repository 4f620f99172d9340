"""The executor p(x | z): concepts in, text out. It reads [<BOS>, plan, <TEXT>] and the text so far, never the prompt.

Legend: B batch, C columns of a plan's block, R text columns, D width, V text vocabulary.
"""

import torch
from torch import Generator, Tensor

from models.functional.gumbel import sample_categorical
from models.functional.next_token import EndIds, are_ends, generated_until_end
from models.interfaces.decoder import TokenCallback
from models.plans.layout import Columns, joined
from models.plans.unified import Reading, UnifiedModel


class Executor:
    """Scores and generates text given a plan, with a shared `UnifiedModel`; it has no weights of its own."""

    def __init__(self, model: UnifiedModel) -> None:
        self.model, self.layout = model, model.layout

    def logits(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, blank: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of each token of text (B, R) given the plan and the tokens before it.

        blank (B, R) bool: tokens that are read as <BLANK>, so that the tokens after them have to come from the plan.
        """
        # 1. the plan
        embeds, columns = self._opening(plan_ids, plan_embeds)
        # 2. all tokens but the last, some of them blank
        read = text if blank is None else text.masked_fill(blank, self.layout.vocabulary.blank)
        tokens = self._tokens(read[:, :-1], 0)
        # 3. each token from the column before it
        states = self.model.states(torch.cat([embeds, tokens[0]], 1), joined(columns, tokens[1]))
        return self.model.text_logits(states[:, embeds.shape[1] - 1 :])

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
        first of them fills what is beyond; none leaves what the model generates there. on_tokens: see `Decoder`.
        """
        reading, tokens = Reading(self.model), list[Tensor]()
        ended = torch.zeros(len(plan_ids), dtype=torch.bool, device=plan_ids.device)
        states = reading.read(*self._opening(plan_ids, plan_embeds))
        for position in range(length):
            logits = self.model.text_logits(states[:, -1])[:, :vocab_size]
            tokens.append(sample_categorical(logits, temperature, generator))
            if on_tokens is not None:
                on_tokens(generated_until_end(tokens, end_ids))
            ended |= are_ends(tokens[-1], end_ids)
            if position + 1 == length or bool(ended.all()):
                break
            states = reading.read(*self._tokens(tokens[-1].unsqueeze(-1), position))
        return generated_until_end(tokens, end_ids, length)

    def generate_greedily(self, ids: Tensor, embeds: Tensor, length: int, vocab_size: int) -> Tensor:
        """The greedy texts (B, length) of plans."""
        unused = Generator(device=ids.device)
        return self.generate(ids, embeds, length, unused, temperature=0.0, vocab_size=vocab_size)

    def _opening(self, ids: Tensor, embeds: Tensor) -> tuple[Tensor, Columns]:
        """[<BOS>, plan, <TEXT>]"""
        v, layout = self.layout.vocabulary, self.layout
        bos, text = layout.of_special(ids), layout.of_special(ids, layout.text_start)
        ends = (
            self.model.embed(torch.full_like(ids[:, :1], token), c.type_ids)
            for token, c in ((v.bos, bos), (v.text, text))
        )
        first, last = ends
        return torch.cat([first, embeds, last], 1), joined(bos, layout.of_block(ids), text)

    def _tokens(self, ids: Tensor, first: int) -> tuple[Tensor, Columns]:
        """Text (B, T) whose first token is number `first`."""
        columns = self.layout.of_text(torch.ones_like(ids, dtype=torch.bool))
        columns = columns._replace(position_ids=columns.position_ids + first)
        return self.model.embed(ids, columns.type_ids), columns
