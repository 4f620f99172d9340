"""Options of online concepts, with every default; they check themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from models.backbones.code_space import Sampler
from models.functional.errors import UsageError, require_at_least, require_choice

Growth = Literal["null", "autoregressive", "accumulate", "fixed", "entropy", "draft", "random"]
RouterReads = Literal["shallow", "whole"]
RateControl = Literal["offset", "multiplier"]
Gate = Literal["slot", "smooth", "mass", "visibility", "none"]
Attention = Literal["sdpa", "flex"]

TERMS = ("text", "ratio", "code", "usage", "draft")
TERMS_OF_CODES = ("code", "usage")


def default_weights() -> dict[str, float]:
    return {"text": 1.0, "ratio": 0.03, "code": 0.1, "usage": 0.01, "draft": 1.0}


@dataclass(frozen=True)
class OnlineModelOptions:
    """What an `OnlineConceptModel` is built of. A saved model is built again from these.

    A position *commits* where it ends a segment of the text; the middle layers read one concept for each such position.
    The positions in between are NULLs. The tail of a position: the NULLs since the last commit.

    split: layers of [shallow, middle, deep], the middle a number or again such a list; None is 2 : 3 : 2.
    levels: 2 splits the middle again in the same proportions: a second level of concepts.
    growth: the rule that decides which positions commit (`growth.GROWTH`).
    router_reads: the hidden states that the rule reads: those of the shallow layers, or those of the whole model, whose other
        layers then also read every position. That saves no FLOPs; it shows what a better decision would be worth.
    draft_tokens: for growth `draft`; how many tokens are drafted after each commit.
    gate: the straight-through estimator that gives this decision a gradient (`commit_gates`).
    codes: size of the codebook of concepts; sampler: how a hidden state is quantised to one of them.
    most_nulls: longest run of NULLs; a segment has at most most_nulls + 1 positions.
    commit_first: the first position of every text commits. Pretrained layers attend to it throughout, as an attention sink
        (Xiao et al., 2309.17453): as a NULL it would be lost to the deep layers. With `fixed` and `random` a text then has one
        concept more.
    carry: the deep input of a NULL also gets a linear map of the concept before it, without attention.
    pool: the input of a concept also gets a linear map of the mean hidden state of the NULLs that it ends.
    attention: implementation in the deep layers.
    """

    split: list | None = None
    levels: int = 1
    growth: Growth = "null"
    router_reads: RouterReads = "shallow"
    draft_tokens: int = 8
    gate: Gate = "slot"
    codes: int = 512
    sampler: Sampler = "gumbel_st"
    most_nulls: int = 15
    commit_first: bool = False
    carry: bool = True
    pool: bool = True
    attention: Attention = "sdpa"

    def __post_init__(self) -> None:
        choices = {
            "growth": Growth,
            "router_reads": RouterReads,
            "gate": Gate,
            "sampler": Sampler,
            "attention": Attention,
        }
        for name, known in choices.items():
            require_choice(f"module.{name}", getattr(self, name), get_args(known))
        if self.codes < 2:
            raise UsageError(f"module.codes={self.codes} must be at least 2, such as module.codes=512")
        if self.most_nulls < 1:
            raise UsageError(
                f"module.most_nulls={self.most_nulls} must be at least 1; 1 commits every second position or more"
            )
        if self.router_reads == "whole" and self.growth in ("fixed", "random"):
            raise UsageError(f"module.growth={self.growth} reads no states; type module.router_reads=shallow")
        require_at_least(1, module__draft_tokens=self.draft_tokens)
        if self.levels < 1:
            raise UsageError(f"module.levels={self.levels} must be at least 1; 1 has no concepts of concepts")

    def of_model(self) -> "OnlineModelOptions":
        """These options alone, without those of training."""
        return OnlineModelOptions(**{part.name: getattr(self, part.name) for part in fields(OnlineModelOptions)})


@dataclass(frozen=True)
class OnlineConceptOptions(OnlineModelOptions):
    """Options of `OnlineConceptModule`: those of its model, and those of training.

    Four pairs are annealed from their first to their second value, linearly over the first `anneal_share` of the steps.
    compression: positions a concept; at 1 every position commits. quantisation: 0 middle layers read hidden states, 1 codes.
    temperatures: of the relaxed codes. noise: scale of the Gumbel noise of codes and commits; 0 takes the most probable.

    gap_tolerance: they go on only while the text's loss is at most this many nats a token above that of the same
        weights without compression (`PacedAnnealing`), which one step in `gap_every` measures; None follows the steps alone.
    gate_every: for gate `visibility`; one step of so many computes its gradient, which needs every position in every layer.
    code_decay: for sampler `ema_vq`; weight of the past in the running means of the codebook.
    weights: of the loss terms (`TERMS`); 0 or a missing one switches a term off.
    hold_rate: one position in `compression` is to commit, at every level; False lets the rate go its own way.
    rate_control: what holds it. `offset`: the routers' offsets are corrected (`RateController`). `multiplier`: learned routers
        are trained to it, by a loss whose weight adapts (`RateMultipliers`).
    baseline: folder of a causal LM to compare with in a test, such as a run of next_token_text; None compares with none.
    temperature: of the sampled decoder.
    lora_rank: LoRA adapters of this rank train instead of the backbone; None trains the backbone.
    """

    gate_every: int = 1
    code_decay: float = 0.99
    compression: tuple[float, float] = (1.0, 4.0)
    quantisation: tuple[float, float] = (0.0, 1.0)
    temperatures: tuple[float, float] = (1.0, 0.5)
    noise: tuple[float, float] = (1.0, 0.0)
    anneal_share: float = 0.5
    gap_tolerance: float | None = None
    gap_every: int = 4
    weights: Mapping[str, float] = field(default_factory=default_weights)
    hold_rate: bool = True
    rate_control: RateControl = "offset"
    baseline: str | None = None
    temperature: float = 1.0
    lora_rank: int | None = None
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compression", "quantisation", "temperatures", "noise"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists come from YAML
        object.__setattr__(self, "weights", dict(self.weights))
        self._check_weights()
        self._check_pairs()
        if not 0 <= self.anneal_share <= 1:
            raise UsageError(f"module.anneal_share={self.anneal_share} must lie between 0 and 1")
        if self.gap_tolerance is not None and self.gap_tolerance <= 0:
            raise UsageError(f"module.gap_tolerance={self.gap_tolerance} must be above 0, such as 0.25, or null")
        require_at_least(1, module__gap_every=self.gap_every)
        if not 0 <= self.code_decay < 1:
            raise UsageError(f"module.code_decay={self.code_decay} must be at least 0 and less than 1, such as 0.99")
        if self.growth in ("entropy", "draft") and not self.hold_rate:
            raise UsageError(
                f"module.growth={self.growth} gets its threshold from rate control; type module.hold_rate=true"
            )
        require_choice("module.rate_control", self.rate_control, get_args(RateControl))
        if self.rate_control == "multiplier" and self.growth not in ("null", "autoregressive", "accumulate"):
            raise UsageError(
                f"module.growth={self.growth} has no weights that could learn a rate; type module.rate_control=offset"
            )
        if self.gate_every < 1:
            raise UsageError(f"module.gate_every={self.gate_every} must be at least 1: every step has the gradient")
        require_at_least(0, module__temperature=self.temperature)
        if self.lora_rank is not None:
            require_at_least(1, module__lora_rank=self.lora_rank)
        if self.baseline is not None and not Path(self.baseline).is_dir():
            raise UsageError(
                f"module.baseline={self.baseline} is no folder; type that of a trained causal LM, <run folder>/model"
            )

    def _check_weights(self) -> None:
        for name, weight in self.weights.items():
            if name not in TERMS:
                raise UsageError(f"module.weights.{name} is not known; the terms are {', '.join(TERMS)}")
            if weight < 0:
                raise UsageError(f"module.weights.{name}={weight} must be at least 0; 0 switches it off")
        if not self.weights.get("text"):
            raise UsageError(
                "module.weights.text must be above 0: it is the text's own loss; type module.weights.text=1"
            )

    def _check_pairs(self) -> None:
        for name, least, most, such in (
            ("compression", 1, math.inf, "[1.0, 4.0]"),
            ("quantisation", 0, 1, "[0.0, 1.0]"),
            ("temperatures", 1e-6, math.inf, "[1.0, 0.5]"),
            ("noise", 0, 1, "[1.0, 0.0]"),
        ):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least or max(pair) > most:
                raise UsageError(f"module.{name}={list(pair)} must be a first and a last value, such as {such}")
        longest = max(self.compression)
        if longest > self.most_nulls + 1:
            raise UsageError(
                f"module.compression={list(self.compression)} needs longer segments than module.most_nulls="
                f"{self.most_nulls} allows; type module.most_nulls={2 * math.ceil(longest)}"
            )
        if self.growth == "draft" and longest > self.draft_tokens + 1:
            raise UsageError(
                f"module.compression={list(self.compression)} needs longer segments than drafts of module.draft_tokens="
                f"{self.draft_tokens} allow; type module.draft_tokens={2 * math.ceil(longest)}"
            )

    def term_weights(self) -> dict[str, float]:
        """A weight for every term. Those of codes are 0 where no layer reads codes: hidden states are not pulled to any."""
        unread = () if any(self.quantisation) else TERMS_OF_CODES
        return {name: 0.0 if name in unread else float(self.weights.get(name, 0.0)) for name in TERMS}
