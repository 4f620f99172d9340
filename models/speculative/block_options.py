"""The options of `BlockDraftModule`."""

from dataclasses import dataclass
from typing import Literal, get_args

from models.functional.errors import UsageError, require_at_least, require_choice
from models.speculative.block_drafter import BlockDrafterOptions, Dependence
from models.speculative.distribution import MixtureDist
from models.speculative.options import Costs, DecodingOptions, Scheme, Verify, require_draft_length

Texts = Literal["target", "data"]
PoolKeeps = Literal["texts", "reads", "half_reads"]
SCHEMES: tuple[Scheme, ...] = ("naive", "ngram", "block_drafter")


@dataclass(frozen=True)
class BlockDraftOptions:
    """Raises UsageError, naming module.<option>, for values that cannot work.

    draft_length, window, num_layers, dependence, rank: see `BlockDrafterOptions`. draft_vocabulary: tokens that are proposed,
        the most frequent ones of the training rows; None proposes all.
    theta_weight, temperature, top_k, top_p: of the target, see `MixtureDist`; the first one is for a pair.
    anchors: blocks of a text in a step. ce, tv, decay: see `draft_loss`.
    texts: drawn from the `target`, which is what it will draft for, or those of the `data`. pool: so many batches of drawn
        texts are kept and trained on in turn, with fresh anchors; 0 draws new ones in every step. pool_keeps: the `texts`, or
        also what the verifiers make of them (`reads`), which takes memory and saves their forward pass in every later step.
        `half_reads` keeps that in numbers of two bytes. Texts of the data are kept with reads alone; without, every step takes
        the next ones.
    served_rows: rows of a validation batch that are decoded.
    schemes: the ways of drafting that `trainer.test` compares. gamma: tokens of a draft that is decoded; None takes
        draft_length, which is also the most, and `auto` the length of the highest expected speed-up up to it, and at most 16.
        verify, costs, cache: see `DecodingOptions`.
    """

    draft_length: int = 8
    window: int = 64
    num_layers: int = 1
    dependence: Dependence = "markov"
    rank: int = 256
    draft_vocabulary: int | None = None
    theta_weight: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    anchors: int = 8
    ce: float = 0.1
    tv: float = 0.9
    decay: float = 4.0
    texts: Texts = "target"
    pool: int = 0
    pool_keeps: PoolKeeps = "texts"
    served_rows: int = 32
    schemes: tuple[Scheme, ...] = SCHEMES
    gamma: int | Literal["auto"] | None = None
    verify: Verify = "token"
    costs: Costs = "parameters"
    cache: bool = True
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", tuple(self.schemes))  # a list, as YAML has it
        if not self.schemes:
            raise UsageError("module.schemes is empty; type for example module.schemes=[block_drafter]")
        for scheme in self.schemes:
            require_choice("module.schemes", scheme, SCHEMES)
        require_choice("module.verify", self.verify, get_args(Verify))
        require_choice("module.costs", self.costs, get_args(Costs))
        if self.gamma is not None:
            require_draft_length("module.gamma", self.gamma)
            if self.gamma != "auto" and self.gamma > self.draft_length:
                raise UsageError(
                    f"module.gamma={self.gamma} is more than the {self.draft_length} tokens of a draft; type "
                    f"module.gamma={self.draft_length}, or module.draft_length={self.gamma} for a drafter of longer drafts"
                )
        require_choice("module.texts", self.texts, get_args(Texts))
        require_choice("module.pool_keeps", self.pool_keeps, get_args(PoolKeeps))
        require_at_least(1, module__anchors=self.anchors, module__served_rows=self.served_rows)
        require_at_least(0, module__ce=self.ce, module__tv=self.tv, module__pool=self.pool)
        if self.pool_keeps != "texts" and not self.pool:
            raise UsageError(
                f"module.pool_keeps={self.pool_keeps} keeps nothing with module.pool=0; type module.pool=64, or "
                "module.pool_keeps=texts"
            )
        if self.decay <= 0:
            raise UsageError(f"module.decay={self.decay} must be above 0")
        if self.ce + self.tv <= 0:
            raise UsageError("module.ce and module.tv are both 0, which trains nothing; type module.tv=0.9")
        try:
            self.mixture  # noqa: B018
        except UsageError as error:
            raise UsageError(f"module.{error}") from None
        self.drafter  # noqa: B018

    @property
    def mixture(self) -> MixtureDist:
        """The target as these options define it."""
        return MixtureDist(self.theta_weight, self.temperature, self.top_k, self.top_p)

    @property
    def pool_size(self) -> int:
        """Batches that are kept. Texts of the data cost nothing to draw again; only what verifiers make of them is worth it."""
        return 0 if self.texts == "data" and self.pool_keeps == "texts" else self.pool

    @property
    def decoding(self) -> DecodingOptions:
        gamma = self.draft_length if self.gamma is None else self.gamma
        return DecodingOptions(self.mixture, gamma, self.verify, self.costs, self.cache)

    @property
    def drafter(self) -> BlockDrafterOptions:
        return BlockDrafterOptions(
            self.draft_length, self.window, self.num_layers, self.dependence, self.rank, self.draft_vocabulary
        )
