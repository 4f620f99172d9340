"""The executor: concepts in, text out. It reads [<BOS>, plan, <TEXT>] and its own words, never the prompt.

Legend: B batch, C columns of a plan's block, R text columns, D width, V text vocabulary.
"""

import torch
from torch import Generator, Tensor

from models.functional.gumbel import sample_categorical
from models.interfaces.decoder import TokenCallback
from models.plans.layout import Columns, joined
from models.plans.unified import Reading, UnifiedModel


class Executor:
    """Scores and says text given a plan, with a shared `UnifiedModel`; it has no weights of its own."""

    def __init__(self, model: UnifiedModel) -> None:
        self.model, self.layout = model, model.layout

    def logits(self, plan_ids: Tensor, plan_embeds: Tensor, text: Tensor, blank: Tensor | None = None) -> Tensor:
        """Logits (B, R, V) of each token of text (B, R) given the plan and the tokens before it.

        blank (B, R) bool: tokens that are read as <BLANK>, so that what follows has to come from the plan.
        """
        # 1. the plan
        embeds, columns = self._opening(plan_ids, plan_embeds)
        # 2. all words but the last, some of them blank
        read = text if blank is None else text.masked_fill(blank, self.layout.vocabulary.blank)
        words = self._words(read[:, :-1], 0)
        # 3. each word from the column before it
        states = self.model.states(torch.cat([embeds, words[0]], 1), joined(columns, words[1]))
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
        on_tokens: TokenCallback | None = None,
    ) -> Tensor:
        """Texts (B, length) of plans, one forward a word, the most probable words at temperature 0.

        vocab_size: ids from there on are padding of the output layer and never said. on_tokens: see `Decoder`.
        """
        reading, said = Reading(self.model), []
        states = reading.read(*self._opening(plan_ids, plan_embeds))
        for place in range(length):
            logits = self.model.text_logits(states[:, -1])[:, :vocab_size]
            said.append(sample_categorical(logits, temperature, generator))
            if on_tokens is not None:
                on_tokens(torch.stack(said, -1))
            if place + 1 < length:
                states = reading.read(*self._words(said[-1].unsqueeze(-1), place))
        return torch.stack(said, -1)

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

    def _words(self, ids: Tensor, place: int) -> tuple[Tensor, Columns]:
        """Text from its word number `place` on."""
        columns = self.layout.of_text(torch.ones_like(ids, dtype=torch.bool))
        columns = columns._replace(position_ids=columns.position_ids + place)
        return self.model.embed(ids, columns.type_ids), columns
