"""q* of two causal models as a `Decoder`: one scheme of drafting and checking, compared with others in the final table."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from models.functional.errors import require_choice
from models.functional.next_token import read_columns
from models.functional.qstar_speed import SPEEDUPS
from models.functional.rows import response_columns
from models.interfaces.decoder import TokenCallback
from models.speculative.cached_scores import CachedScores
from models.speculative.costs import ForwardCosts, forward_costs
from models.speculative.decode import decode_qstar
from models.speculative.distribution import MixtureDist
from models.speculative.ngram import NgramScores
from models.speculative.random_source import RandomSource, TorchRandomSource
from models.speculative.roles import Draft, parameter_cost, roles
from models.speculative.scores import CausalScores
from models.speculative.state import QStarOutput

Scheme = Literal["naive", "theta", "target", "alternate", "ngram", "assistant"]
Costs = Literal["parameters", "measured"]
NAMES = {
    "naive": "q*, both at every token",
    "theta": "q*, π_θ drafts",
    "target": "q*, π_t drafts",
    "alternate": "q*, alternating",
    "ngram": "q*, n-grams draft",
    "assistant": "q*, a third drafts",
}


class QStarDecoder:
    """theta, target: causal models of one vocabulary; assistant: a third one, for the scheme that names it.

    vocab_size: ids from there on are never said. eos_id ends a text, and fills what is beyond. costs: what a draft is thought
    to cost, by the models' `parameters`, or `measured` once for each size of batch; then the texts of a seed depend on the
    machine, but never their law. outputs: what each call found, oldest first; whoever reads them clears them.
    """

    method = "student"
    refines = False

    def __init__(
        self,
        theta: nn.Module,
        target: nn.Module,
        scheme: Scheme,
        *,
        response_length: int,
        vocab_size: int,
        eos_id: int | None,
        mixture: MixtureDist,
        gamma: int | Literal["auto"] = "auto",
        verify: Literal["token", "block"] = "token",
        cache: bool = True,
        assistant: nn.Module | None = None,
        costs: Costs = "parameters",
    ) -> None:
        require_choice("module.schemes", scheme, NAMES)
        self.theta, self.target, self.assistant = theta, target, assistant
        self.scheme, self.name, self.response_length = scheme, NAMES[scheme], response_length
        self.vocab_size, self.eos_id, self.mixture, self.verify = vocab_size, eos_id, mixture, verify
        self.gamma = 0 if scheme == "naive" else gamma
        self.kind, self.costs = CachedScores if cache else CausalScores, costs
        self._measured: dict[int, ForwardCosts] = {}  # by the texts of a batch
        self.outputs: list[QStarOutput] = []

    @property
    def draft(self) -> Draft:
        return {"naive": "theta", "ngram": "assistant"}.get(self.scheme, self.scheme)

    def forward_costs(self, prompts: Tensor) -> ForwardCosts:
        """A forward of the drafter over one of its checkers (of θ over t where one of them drafts), and of a further place."""
        if self.costs == "parameters":
            return ForwardCosts(parameter_cost(self.theta, self.target, self.draft, self.assistant), 0.0)
        if len(prompts) not in self._measured:
            self._measured[len(prompts)] = forward_costs(self.theta, self.target, prompts, self._third)
        return self._measured[len(prompts)]

    @property
    def _third(self) -> nn.Module | NgramScores | None:
        return {"ngram": NgramScores(self.vocab_size), "assistant": self.assistant}.get(self.scheme)

    @property
    def forwards(self) -> int:
        """Evaluations of both models for a batch, in the oldest call of `outputs`; both at every token without one."""
        if not self.outputs:
            return 2 * self.response_length
        return self.outputs[0].forwards["theta"] + self.outputs[0].forwards["target"]

    def decode(
        self,
        prompts: Tensor,
        lengths: Tensor,
        most: int,
        rng: RandomSource,
        settled: Callable[[Tensor], None] | None = None,
    ) -> QStarOutput:
        """At most `most` tokens after right-padded prompts (B, L), of which lengths (B,) are real; settled: of one text."""
        third = self._third
        if isinstance(third, nn.Module):
            third = self.kind(third, self.vocab_size)
        cost, wide = self.forward_costs(prompts)
        return decode_qstar(
            self.kind(self.theta, self.vocab_size), self.kind(self.target, self.vocab_size), prompts, lengths=lengths,
            assistant=third, max_new_tokens=most, mixture=self.mixture, gamma=self.gamma, draft=self.draft, verify=self.verify,
            cost=cost, wide=wide, eos_ids=() if self.eos_id is None else (self.eos_id,), rng=rng, settled=settled,
        )  # fmt: skip

    def __call__(self, rows: dict[str, Tensor], generator: Generator, on_tokens: TokenCallback | None = None) -> Tensor:
        """on_tokens: of a batch of one, called after every round."""
        said: list[Tensor] = []

        def settled(new: Tensor) -> None:
            said.append(new)
            on_tokens(torch.cat(said).unsqueeze(0))

        rng = TorchRandomSource(generator)
        out = self.decode(*prompts_of(rows), self.response_length, rng, settled if on_tokens else None)
        self.outputs.append(out)
        if on_tokens is not None:
            on_tokens(out.tokens)
        return out.tokens

    def expected_speedup(self, out: QStarOutput) -> float | None:
        """The formula's speed-up at the acceptance that `out` had; None where nothing was drafted."""
        if not out.drafts:
            return None
        cost, wide = self.forward_costs(out.tokens)
        who, gamma = roles(self.draft, cost), max(1, round(out.drafted / out.drafts))
        return SPEEDUPS[who.formula](gamma, out.acceptance.get(who.drafter, 0.0), who.cost, wide)


def prompts_of(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What stands before the response, right-padded (B, P), and its lengths (B,)."""
    columns = response_columns(rows["response_mask"])
    seen = read_columns(rows)[:, :-columns]
    return right_padded(rows["input_ids"][:, :-columns], seen)


def right_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts (B, L) with their padding moved to the right, and their lengths (B,)."""
    if attention_mask is None:
        return input_ids, torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    order = (attention_mask == 0).long().argsort(dim=-1, stable=True)
    return input_ids.gather(1, order), attention_mask.long().sum(-1)
