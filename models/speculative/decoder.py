"""q* of two causal models as a `Decoder`: one way of drafting, a row of the final table."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from models.functional.next_token import EndIds, as_end_ids, read_columns
from models.functional.qstar_speed import SPEEDUPS
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback
from models.speculative.cached_scores import CachedScores
from models.speculative.costs import ForwardCosts, forward_costs, parameter_cost
from models.speculative.decode import decode_qstar
from models.speculative.ngram import NgramScores
from models.speculative.options import DecodingOptions, Draft, DraftOptions, Scheme
from models.speculative.random_source import RandomSource, TorchRandomSource
from models.speculative.roles import roles
from models.speculative.scores import CausalScores
from models.speculative.state import QStarOutput, Scores, TextRules

# the row of each scheme in tables
TITLES: dict[Scheme, str] = {
    "naive": "q*, both at every token",
    "theta": "q*, π_θ drafts",
    "target": "q*, π_t drafts",
    "alternate": "q*, alternating",
    "ngram": "q*, n-grams draft",
    "assistant": "q*, a third drafts",
    "block_drafter": "q*, blocks are drafted",
}


class QStarDecoder:
    """theta, target: causal models of one vocabulary; where both are the same object, texts are its own and it runs once.

    assistant: a third one, for the scheme of that name; for the scheme block_drafter a `ProposesBlocks`.

    options: see `DecodingOptions`. vocab_size: ids from there on are never generated. Each of end_ids
    ends a text, and the first of them fills what is beyond. outputs: of each call, oldest first; its reader clears them.
    """

    method = "student"
    refines = False

    def __init__(
        self,
        theta: nn.Module,
        target: nn.Module,
        scheme: Scheme,
        options: DecodingOptions,
        *,
        response_length: int,
        vocab_size: int,
        end_ids: EndIds,
        assistant: nn.Module | None = None,
    ) -> None:
        self.theta, self.target, self.assistant = theta, target, assistant
        self.scheme, self.name, self.options, self.mixture = scheme, TITLES[scheme], options, options.mixture
        self.gamma = 0 if scheme == "naive" else options.gamma
        self.response_length, self.vocab_size, self.end_ids = response_length, vocab_size, as_end_ids(end_ids)
        self.make_scores: Callable[[Any, int | None], Scores] = CachedScores if options.cache else CausalScores
        self._measured: dict[int, ForwardCosts] = {}  # by the number of texts of a batch
        self.outputs: list[QStarOutput] = []

    @property
    def draft(self) -> Draft:
        own: dict[Scheme, Draft] = {"naive": "theta", "ngram": "assistant"}
        return own.get(self.scheme) or cast(Draft, self.scheme)

    @property
    def drafter(self) -> nn.Module | NgramScores | None:
        """The third model, or the n-grams, that the scheme drafts with; None where theta or target draft."""
        if self.scheme in ("assistant", "block_drafter"):
            return self.assistant
        return NgramScores(self.vocab_size) if self.scheme == "ngram" else None

    @property
    def forwards(self) -> int:
        """Forward passes of both models for a batch, in the oldest call of `outputs`; two a token where there is none.

        One model is counted once.
        """
        if not self.outputs:
            return (1 if self.target is self.theta else 2) * self.response_length
        return sum(self.outputs[0].forwards.get(name, 0) for name in ("theta", "target"))

    def draft_options(self, prompts: Tensor) -> DraftOptions:
        """How a batch after these prompts (B, L) is drafted."""
        # without drafts no figure uses them; of a fixed length the expected speed-up does
        if self.options.costs == "parameters" or self.gamma == 0:
            costs = ForwardCosts(parameter_cost(self.theta, self.target, self.draft, self.assistant), 0.0)
        elif (known := self._measured.get(len(prompts))) is not None:
            costs = known
        else:
            costs = forward_costs(
                self.theta, self.target, prompts, self.drafter,
                mixture=self.mixture, verify=self.options.verify, vocab_size=self.vocab_size,
            )  # fmt: skip
            self._measured[len(prompts)] = costs
        return DraftOptions(self.draft, self.gamma, self.options.verify, *costs)

    def decode(
        self,
        prompts: Tensor,
        lengths: Tensor,
        max_new_tokens: int,
        rng: RandomSource,
        on_tokens: TokenCallback | None = None,
    ) -> QStarOutput:
        """Texts after right-padded prompts (B, L), of which lengths (B,) count. on_tokens: see `decode_qstar`."""
        theta = self.make_scores(self.theta, self.vocab_size)
        target = theta if self.target is self.theta else self.make_scores(self.target, self.vocab_size)
        drafter: Any = self.drafter
        in_network = isinstance(drafter, nn.Module) and self.scheme != "block_drafter"
        assistant = self.make_scores(drafter, self.vocab_size) if in_network else drafter
        rules = TextRules(max_new_tokens, eos_ids=self.end_ids)
        return decode_qstar(
            theta, target, prompts, self.draft_options(prompts), rules,
            rng=rng, lengths=lengths, assistant=assistant, mixture=self.mixture, on_tokens=on_tokens,
        )  # fmt: skip

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        """on_tokens: for a batch of one, called after every round."""
        out = self.decode(*prompts_of(rows), self.response_length, TorchRandomSource(generator), on_tokens)
        self.outputs.append(out)
        if on_tokens is not None:
            on_tokens(out.tokens)
        return out.tokens

    def expected_speedup(self, out: QStarOutput) -> float | None:
        """The formula's speed-up at the acceptance rate of `out`; None where nothing was drafted."""
        if not out.drafts:
            return None
        drafting = self.draft_options(out.tokens)
        who, gamma = roles(drafting), max(1, round(out.drafted_tokens / out.drafts))
        return SPEEDUPS[who.formula](gamma, out.acceptance.get(who.drafter, 0.0), who.cost, drafting.position_cost)


def prompts_of(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What precedes the responses, right-padded (B, P), and its lengths (B,)."""
    columns = response_columns(rows["response_mask"])
    seen = read_columns(rows)[:, :-columns]
    return right_padded(rows["input_ids"][:, :-columns], seen)


def right_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts (B, L) with their padding moved to the right, and their lengths (B,)."""
    if attention_mask is None:
        return input_ids, torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    order = (attention_mask == 0).long().argsort(dim=-1, stable=True)
    return input_ids.gather(1, order), attention_mask.long().sum(-1)
