"""Options of a planner-executor with all their defaults. Each dataclass checks itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from models.backbones.code_space import Sampler
from models.functional.errors import UsageError, require_at_least, require_choice, require_share
from models.interfaces.optimizer import OptimizerName
from models.plans.layout import Planning
from models.plans.rows import PosteriorReads
from models.plans.sources import Code
from models.plans.terms import NAMES

Weight = float | Sequence[float]
ExecutorKind = Literal["autoregressive", "parallel"]


@dataclass(frozen=True)
class SearchOptions:
    """Hard EM.

    begin, end: shares of the steps between which a text is trained on the best plan found for it. candidates, explore,
    prior_weight: see `PlanSearch`. interval, tolerance: see `Refresh`.
    """

    begin: float = 0.6
    end: float = 1.0
    candidates: int = 4
    explore: float = 0.25
    prior_weight: float = 1.0
    interval: int = 250
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise UsageError(
                f"module.search.begin={self.begin} and end={self.end} must be shares of the steps in this order"
            )
        if self.candidates < 1 or self.interval < 1 or not 0 <= self.explore <= 1:
            raise UsageError("module.search needs candidates and interval of at least 1 and explore from 0 to 1")
        require_at_least(0, module__search__prior_weight=self.prior_weight, module__search__tolerance=self.tolerance)


def _types() -> dict[str, dict[str, int | None]]:
    return {name: {"codes": 8, "most": 1, "least": None, "levels": 1} for name in "abcd"}


def _planning() -> dict[str, Planning]:
    return {"prior": "sequential", "posterior": "slots"}


def _weights() -> dict[str, Weight]:
    given: dict[str, Weight] = {"text": 1.0, "planner": 1.0, "posterior": 1.0, "bag": 1.0, "commitment": 0.25}
    given["usage"] = (1.0, 0.0)
    return {name: given.get(name, 0.0) for name in NAMES}


@dataclass(frozen=True)
class PlanOptions:
    """A pair is the first and the last value, linear over the first `anneal_share` of the steps.

    types: {name: {"codes", "most", "least", "levels"}} in planning order; least of None is `most`; a type of None is left out.
        With several levels a concept is one of `codes` codes at each (residual quantisation); for `ema_vq` or `fsq` with a
        posterior planned by `slots`.
    sampler: how the posterior chooses codes.
    planning: `layout.Planning` of prior and posterior; None: both sequential.
    posterior_reads: `text` or `all`, prompt and text.
    signals: {type: signal of the corpus} that types have to predict.
    signal_codes: whether the codes of these types are the values of their signals; for `ema_vq` or `fsq` without search.
        Where every type has a signal and `weights` has 0 for the loss `signals`, the plan of a text is known without a
        posterior, which is then neither run nor trained.
    code_words: with `signal_codes`, codes begin as the mean embedding of the tokens of their value (`start_as_words`).
    curriculum: share of the steps after which texts of all lengths count; shorter texts come first.
    quantise: shares of the steps between which what is read moves from the points to their codes.
    code_decay: weight of the past in the codes' running means.
    search: `SearchOptions` by name; None trains straight through to the end.
    weights: of the losses in `terms.NAMES`, a number or a pair. A loss that is not named has 0; None: the defaults.
    free_bits: nats of a slot's KL without a cost.
    quota: concepts a text that the loss `quota` asks for.
    quota_gain: above 0 a multiplier moves by this times (mean - quota) in every step, until the mean is at the quota
        (`QuotaMultipliers`); 0: a penalty alone, which leaves the mean off it.
    temperatures: of the relaxation, a pair.
    noise: 1 draws concepts from the posterior, 0 takes the most probable ones; a pair.
    corruption: share of the executor's tokens that are hidden in training, a pair.
    anneal_share: share of the steps until pairs are at their last value.
    executor: writes texts token after token (`AutoregressiveExecutor`), or all tokens at once (`ParallelExecutor`).
    hidden_rows: share of a parallel executor's rows whose tokens are all hidden in training, a pair; of the others a random
        part is. `corruption` is the other executor's.
    refinements: numbers of further forward passes of a parallel executor. The table has a row for each; an exported model
        generates with the last.
    redraw: share of a text's tokens that a refinement draws again.
    plan_temperature, temperature: of concepts and of tokens in the sampled decoder.
    lora_rank: of adapters that are trained with the new tables; None trains all weights.
    optimizer: adamw, or muon for the matrices of the layers and AdamW for everything else.
    """

    types: Mapping[str, Mapping[str, int | None] | None] = field(default_factory=_types)
    sampler: Sampler = "ema_vq"
    planning: Mapping[str, Planning] | None = field(default_factory=_planning)
    posterior_reads: PosteriorReads = "text"
    signals: Mapping[str, str] | None = None
    signal_codes: bool = False
    code_words: bool = False
    curriculum: float = 0.0
    quantise: tuple[float, float] = (0.1, 0.4)
    code_decay: float = 0.99
    search: Mapping[str, float] | None = field(default_factory=lambda: asdict(SearchOptions()))
    weights: Mapping[str, Weight] | None = field(default_factory=_weights)
    free_bits: float = 0.0
    quota: float | None = None
    quota_gain: float = 0.0
    temperatures: tuple[float, float] = (1.0, 0.5)
    noise: tuple[float, float] = (1.0, 1.0)
    corruption: tuple[float, float] = (1.0, 0.0)
    anneal_share: float = 0.6
    executor: ExecutorKind = "autoregressive"
    hidden_rows: tuple[float, float] = (0.5, 0.5)
    refinements: tuple[int, ...] = (0,)
    redraw: float = 0.25
    plan_temperature: float = 1.0
    temperature: float = 1.0
    lora_rank: int | None = None
    optimizer: OptimizerName = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("quantise", "temperatures", "noise", "corruption", "hidden_rows", "refinements"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sequential = {"prior": "sequential", "posterior": "sequential"}
        planning = sequential if self.planning is None else _planning() | dict(self.planning)
        object.__setattr__(self, "planning", planning)
        weights = _weights() if self.weights is None else self.weights
        weights = {name: tuple(weight) if isinstance(weight, Sequence) else weight for name, weight in weights.items()}
        object.__setattr__(self, "weights", weights)
        self._check_choices()
        self._check_weights()
        self._check_schedules()
        self._check_signal_codes()
        self._check_executor()
        _ = self.search_options

    @property
    def search_options(self) -> SearchOptions | None:
        """Errors: UsageError that names module.search.<option>."""
        if self.search is None:
            return None
        known = [option.name for option in fields(SearchOptions)]
        for name in self.search:
            if name not in known:
                raise UsageError(f"module.search.{name} is not known; the options are {', '.join(known)}")
        changes: dict[str, Any] = dict(self.search)
        return SearchOptions(**changes)

    @property
    def signal_types(self) -> tuple[str, ...]:
        """The types whose codes are the values of a signal."""
        return tuple(self.signals or ()) if self.signal_codes else ()

    @property
    def plans_known(self) -> bool:
        """Whether every type's codes are the values of a signal that the posterior does not have to predict."""
        types = {name for name, kind in self.types.items() if kind is not None}
        return types <= set(self.signal_types) and not max(self.weight_ends["signals"])

    @property
    def filled_planning(self) -> Mapping[str, Planning]:
        """`planning` with the default where it was None."""
        assert self.planning is not None
        return self.planning

    @property
    def filled_weights(self) -> Mapping[str, Weight]:
        """`weights` with the defaults where it was None."""
        assert self.weights is not None
        return self.weights

    @property
    def weight_ends(self) -> dict[str, tuple[float, float]]:
        """The first and the last weight of every loss."""
        return {name: pair(self.filled_weights.get(name, 0.0)) for name in NAMES}

    @property
    def draw_noise(self) -> tuple[float, float]:
        """`noise`, which a quantiser has none of."""
        return self.noise if self.sampler == "gumbel_st" else (0.0, 0.0)

    @property
    def hidden(self) -> tuple[float, float]:
        """What the executor's training hides, first and last: a share of its tokens, or of its rows."""
        return self.hidden_rows if self.executor == "parallel" else self.corruption

    @property
    def hidden_name(self) -> str:
        """The option that `hidden` is."""
        return "hidden_rows" if self.executor == "parallel" else "corruption"

    def _check_executor(self) -> None:
        require_choice("module.executor", self.executor, get_args(ExecutorKind))
        rows, further = list(self.hidden_rows), list(self.refinements)
        if len(rows) != 2 or min(rows) < 0 or max(rows) > 1:
            raise UsageError(f"module.hidden_rows={rows} must be two shares from 0 to 1, such as [0.5, 0.5]")
        if not further or min(further) < 0 or len(set(further)) < len(further):
            raise UsageError(f"module.refinements={further} must be different numbers of at least 0, such as [0, 1, 2]")
        if not 0 < self.redraw <= 1:
            raise UsageError(f"module.redraw={self.redraw} must be a share above 0 and at most 1")
        if self.executor != "parallel" and further != [0]:
            raise UsageError(
                f"module.refinements={further} redraws tokens of the parallel executor; type module.executor=parallel, or "
                "module.refinements=[0]"
            )

    def _check_choices(self) -> None:
        require_choice("module.sampler", self.sampler, get_args(Sampler))
        require_choice("module.posterior_reads", self.posterior_reads, get_args(PosteriorReads))
        for who, planning in self.filled_planning.items():
            require_choice("module.planning", who, _planning())
            require_choice(f"module.planning.{who}", planning, get_args(Planning))

    def _check_weights(self) -> None:
        weights = self.filled_weights
        for name, weight in weights.items():
            if name not in NAMES:
                raise UsageError(f"module.weights.{name} is not known; the losses are {', '.join(NAMES)}")
            if min(pair(weight)) < 0:
                raise UsageError(f"module.weights.{name}={weight} must be at least 0; 0 switches it off")
        first, last = (max((pair(weight)[end] for weight in weights.values()), default=0.0) for end in (0, 1))
        if min(first, last) == 0:
            when = "" if first == last else " at the first step" if first == 0 else " at the last step"
            raise UsageError(
                f"module.weights are all 0{when}; type for example module.weights.text=1 module.weights.planner=1"
            )
        if weights.get("quota") and self.quota is None:
            raise UsageError("module.weights.quota needs a number of concepts a text; type for example module.quota=3")
        if self.quota_gain and not weights.get("quota"):
            raise UsageError("module.quota_gain adapts the loss quota; type for example module.weights.quota=1")
        require_at_least(0, module__free_bits=self.free_bits, module__quota_gain=self.quota_gain)
        if self.quota is not None:
            require_at_least(0, module__quota=self.quota)

    def _check_schedules(self) -> None:
        ends = {name: list(getattr(self, name)) for name in ("temperatures", "noise", "corruption", "quantise")}
        temperatures, noise, hidden, moved = ends.values()
        if len(temperatures) != 2 or min(temperatures) <= 0:
            raise UsageError(f"module.temperatures={temperatures} must be two numbers above 0, such as [1.0, 0.5]")
        if len(noise) != 2 or not 0 <= noise[0] <= 1 or noise[1] not in (0, 1):
            raise UsageError(f"module.noise={noise} must begin between 0 and 1 and end in 0 or 1, such as [0.0, 1.0]")
        if len(hidden) != 2 or min(hidden) < 0 or max(hidden) > 1:
            raise UsageError(f"module.corruption={hidden} must be two shares from 0 to 1, such as [0.5, 0.0]")
        if len(moved) != 2 or not 0 <= moved[0] <= moved[1] <= 1:
            raise UsageError(f"module.quantise={moved} must be two shares in this order, such as [0.1, 0.4]")
        require_share(module__anneal_share=self.anneal_share, module__curriculum=self.curriculum)
        require_share(module__code_decay=self.code_decay)
        require_at_least(0, module__plan_temperature=self.plan_temperature, module__temperature=self.temperature)
        if self.lora_rank is not None:
            require_at_least(1, module__lora_rank=self.lora_rank)

    def _check_signal_codes(self) -> None:
        if not self.signal_codes:
            if self.code_words:
                raise UsageError("module.code_words=true needs codes with a meaning; type module.signal_codes=true")
            return
        if not self.signals:
            raise UsageError("module.signal_codes=true needs signals; type for example module.signals={a: who}")
        if self.sampler == "gumbel_st":
            raise UsageError(
                "module.signal_codes=true draws no codes; type module.sampler=ema_vq or module.sampler=fsq"
            )
        if self.search is not None:
            raise UsageError(
                "module.signal_codes=true leaves nothing to search for in those types; type module.search=null"
            )
        if not max(self.weight_ends["signals"]) and not self.plans_known:
            free = [name for name, kind in self.types.items() if kind is not None and name not in self.signals]
            raise UsageError(
                "module.signal_codes=true trains the posterior by the loss signals alone; "
                f"type for example module.weights.signals=0.1, or give {', '.join(free)} a signal too"
            )


@dataclass(frozen=True)
class FixedPlanOptions(PlanOptions):
    """Options of a planner-executor whose plans are not learned: code, tokens as of `FixedPlans`.

    types are used by code=hash alone. Options that say how a plan is learned have no effect.
    """

    code: Code = "leading"
    tokens: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("module.code", self.code, get_args(Code))
        require_at_least(1, module__tokens=self.tokens)
        for name, kind in self.types.items():
            if self.code == "hash" and kind is not None and (kind.get("levels") or 1) > 1:
                raise UsageError(f"module.code=hash has codes of one level; type module.types.{name}.levels=1")


def pair(weight: Weight) -> tuple[float, float]:
    """A weight's first and last value; a single number is both."""
    first, last = weight if isinstance(weight, Sequence) else (weight, weight)
    return float(first), float(last)


def plain(options: PlanOptions) -> dict[str, Any]:
    """Options by name, of types that a checkpoint and JSON can hold."""
    return _plain(asdict(options))


def _plain(value: Any) -> Any:
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, Mapping) else value
