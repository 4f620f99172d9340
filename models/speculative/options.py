"""The options of q*: how drafts are made and verified, and all options of `QStarDecodingModule`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from models.functional.errors import UsageError, require_at_least, require_choice
from models.speculative.distribution import MixtureDist

Draft = Literal["theta", "target", "alternate", "assistant", "block_drafter"]
Verify = Literal["token", "block", "shared_noise"]
Scheme = Literal["naive", "theta", "target", "alternate", "ngram", "assistant", "block_drafter"]
Costs = Literal["parameters", "measured"]
QStarLoss = Literal["kl", "acceptance"]

MAX_GAMMA = 16  # the longest draft of gamma="auto"


def require_draft_length(option: str, gamma: int | str) -> None:
    """Raise UsageError, naming the option, unless gamma is `auto` or a whole number from 0 on."""
    if gamma != "auto" and (not isinstance(gamma, int) or gamma < 0):
        raise UsageError(f"{option}={gamma} must be a whole number, at least 0, or auto")


@dataclass(frozen=True)
class DraftOptions:
    """How tokens of q* are drafted and verified. The distribution of the texts is q* for every value.

    draft: the model that drafts. `alternate` is the cheaper of theta and target; after a draft that is accepted whole, the
    verifier's own token is the next proposal. `block_drafter` proposes all tokens of a draft in one forward pass.
    gamma: tokens of a draft. 0 runs both models for every token. `auto` takes the length of the highest expected speed-up at
    the acceptance rate so far; that may be 0.
    verify: token by token (Leviathan et al., 2023) or as a block (Sun et al., 2024); `shared_noise` draws every token of q*
    with Gumbel noise of its position, and a drafted token is accepted where it is that draw. The texts of a seed are then the
    same whoever drafts, up to the rounding of the forward passes. A third model draws with the same noise (Daliri et al.,
    2408.07978); a block drafter of dependence=noise draws with its own.
    cost: seconds of a forward pass of theta over one of target; with an assistant, of its pass over one of both.
    position_cost: what each further position adds to a forward pass, as a fraction of the pass. `forward_costs` measures both
    costs; they only decide who drafts in `alternate`, and how much in `auto`.
    """

    draft: Draft = "theta"
    gamma: int | Literal["auto"] = 4
    verify: Verify = "token"
    cost: float = 1.0
    position_cost: float = 0.0

    def __post_init__(self) -> None:
        require_choice("draft", self.draft, get_args(Draft))
        require_choice("verify", self.verify, get_args(Verify))
        require_draft_length("gamma", self.gamma)
        require_at_least(0, position_cost=self.position_cost)
        if self.verify == "shared_noise" and self.gamma != 0 and self.draft in ("theta", "target", "alternate"):
            raise UsageError(
                f"verify=shared_noise needs a third model that drafts, not draft={self.draft}; type verify=token"
            )
        if self.cost <= 0:
            raise UsageError(f"cost={self.cost} must be above 0")

    @property
    def max_gamma(self) -> int:
        """The longest draft that may occur."""
        return MAX_GAMMA if self.gamma == "auto" else self.gamma


@dataclass(frozen=True)
class DecodingOptions:
    """What a `QStarDecoder` generates, and how.

    mixture: q* itself. gamma, verify: see `DraftOptions`. costs: where `gamma=auto` and the expected speed-up take the cost of
    a draft from; `parameters` counts further positions as free, and `measured` depends on the machine.
    cache: key-value caches; False reads whole prefixes in every forward pass.
    """

    mixture: MixtureDist = field(default_factory=MixtureDist)
    gamma: int | Literal["auto"] = "auto"
    verify: Verify = "token"
    costs: Costs = "parameters"
    cache: bool = True


@dataclass(frozen=True)
class QStarOptions:
    """The options of `QStarDecodingModule`. Raises UsageError, naming module.<option>, for values that cannot work.

    theta_weight: α, the weight of π_θ; None solves for equal divergences at every position.
    temperature acts on both models, top_k and top_p on q*.
    schemes: the ways of drafting that `trainer.test` compares; `naive` runs both models for every token.
    gamma, verify: see `DraftOptions`. costs, cache: see `DecodingOptions`.
    loss: what draws π_θ toward q*, on texts that π_θ generates. lora_rank: of adapters of π_θ; None trains all its weights.
    exactness_samples: texts of the G-test of each scheme; 0 skips the exactness tests. Where the corpus cannot list all texts,
        they are of four tokens after one prompt.
    drafter: folder of a block drafter that was trained for both models, for the scheme block_drafter.
    alpha_points: values of α at which a test measures both divergences of q_α (`AlphaCurve`); 0 draws no such curve.
    """

    theta_weight: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    schemes: tuple[Scheme, ...] = ("naive", "theta", "target", "alternate", "ngram")
    gamma: int | Literal["auto"] = "auto"
    verify: Verify = "token"
    costs: Costs = "parameters"
    cache: bool = True
    loss: QStarLoss = "kl"
    lora_rank: int | None = None
    exactness_samples: int = 8192
    alpha_points: int = 41
    drafter: str | None = None
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", tuple(self.schemes))  # a list, as YAML has it
        if not self.schemes:
            raise UsageError("module.schemes is empty; type for example module.schemes=[alternate]")
        for scheme in self.schemes:
            require_choice("module.schemes", scheme, get_args(Scheme))
        require_choice("module.verify", self.verify, get_args(Verify))
        require_choice("module.costs", self.costs, get_args(Costs))
        require_choice("module.loss", self.loss, get_args(QStarLoss))
        require_draft_length("module.gamma", self.gamma)
        require_at_least(0, module__exactness_samples=self.exactness_samples, module__alpha_points=self.alpha_points)
        if "block_drafter" in self.schemes and self.drafter is None:
            raise UsageError(
                "module.schemes names block_drafter, but there is no drafter; type module.drafter=<run folder>/drafter of "
                "experiment=block_draft_oracle with the same two models"
            )
        if self.alpha_points == 1:
            raise UsageError("module.alpha_points=1 is no curve; type module.alpha_points=41, or 0 for no curve")
        own = [scheme for scheme in self.schemes if scheme in ("theta", "target", "alternate")]
        if self.verify == "shared_noise" and own:
            raise UsageError(
                f"module.verify=shared_noise needs a third model that drafts, and module.schemes has {own[0]}; type for "
                "example module.schemes=[naive,ngram]"
            )
        if self.lora_rank is not None:
            require_at_least(1, module__lora_rank=self.lora_rank)
            if self.drafter is not None:
                raise UsageError(
                    "module.drafter was trained for π_θ as it was, and module.lora_rank trains π_θ further; leave one out"
                )
        try:
            self.mixture  # noqa: B018
        except UsageError as error:
            raise UsageError(f"module.{error}") from None

    @property
    def mixture(self) -> MixtureDist:
        """q* as these options define it."""
        return MixtureDist(self.theta_weight, self.temperature, self.top_k, self.top_p)

    @property
    def decoding(self) -> DecodingOptions:
        return DecodingOptions(self.mixture, self.gamma, self.verify, self.costs, self.cache)
