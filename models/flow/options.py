"""The options of the flows' modules: every default, and the checks that need no model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from models.flow.endpoint_pairs import Coupling
from models.flow.masked_student import Adapter as MaskedAdapter
from models.flow.noisy_mask_student import Adapter, NoiseRead
from models.flow.solver import FewStep, require_flow_options
from models.functional.errors import UsageError, require_at_least, require_choice
from models.functional.flow_times import TimeLaw, require_shares
from models.functional.jvp import JvpBackend
from models.functional.meanflow import FlowLoss, Tangent
from models.interfaces.masked_sampling import TeacherOptions
from models.interfaces.optimizer import OptimizerName

FlowTarget = Literal["psd", "meanflow"]
Weighting = Literal["none", "inverse_p", "adaptive"]


def _stages() -> dict[str, dict[str, float]]:
    return {
        "adapt": {"share": 0.315, "lr": 3e-3},
        "flow": {"share": 0.05, "lr": 1e-3},
        "polish": {"share": 0.635, "lr": 1.5e-3},
    }


def _as_tuples(options: object, *names: str) -> None:
    """Lists of numbers, as YAML gives them, become tuples."""
    for name in names:
        object.__setattr__(options, name, tuple(getattr(options, name)))


@dataclass(frozen=True, kw_only=True)
class NoisyMaskFlowOptions(TeacherOptions):
    """Options of `NoisyMaskFlowModule`.

    adapter, noise_read, prompt_*, lora_rank: see `NoisyMaskStudent`. sigma, time_center: see `NoisyMaskPath`.
    stages: share of trainer.max_steps and peak learning rate of adapt, flow and polish; share 0 leaves a stage out. Without
        `adapt`, the student that training starts from (student_path=...) is the denoiser.
    teacher_weight: λ of KL(teacher || ψ_{0,0}) in adapt. observed_share: rows with part of the response given.
    recent_texts: adapt averages its targets over this many texts of the epoch's last batches, of those that have the row's
        prompt (`NoisyMaskPath.token_posterior`); with 0 the target is each row's own text.
    target: `meanflow` (with derivatives) for intervals that end by meanflow_until and `psd` for the others, or `psd` for all.
    rho_min: bounds the mean-flow target. jvp_backend, jvp_step: see `value_and_jvp`.
    diagonal_share, endpoint_share: rows with s = t, and rows from s = 0 to the widest end.
    growth: the share of the flow stage after which intervals may span all of [0, 1]. weighted: see `gap_weight`.
    ode_steps, pair_reuse, pair_window, coupling: see `EndpointPairs`.
    interval_share: rows of a polishing step that makes pairs which learn intervals of the followed flow (`FlowIntervals`)
        instead of endpoints: the jumps of those student_forwards that divide ode_steps.
    average_decay: weight of the past in the running average.
    optimizer, weight_decay: see `make_optimizer`.
    forwards, teacher_*: the teacher's rows in the table, see `TeacherOptions`.
    student_forwards: the student's rows in the table, and the answers whose jumps it learns.
    ode_forwards: rows of the denoiser's flow. few_step, promote: how the student generates, see `follow_flow`.
    """

    adapter: Adapter = "full"
    noise_read: NoiseRead = "linear"
    lora_rank: int = 16
    prompt_length: int = 8
    prompt_hidden_size: int = 128
    prompt_rank: int = 32
    sigma: float = 2.0
    time_center: float = 0.5
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=_stages)
    teacher_weight: float = 0.02
    recent_texts: int = 1024
    observed_share: float = 0.1
    target: FlowTarget = "meanflow"
    meanflow_until: float = 0.95
    rho_min: float = 0.05
    jvp_backend: JvpBackend = "forward_ad"
    jvp_step: float = 1e-2
    diagonal_share: float = 0.25
    endpoint_share: float = 0.25
    growth: float = 0.5
    weighted: bool = False
    ode_steps: int = 8
    pair_reuse: int = 4
    pair_window: int = 16
    coupling: Coupling = "flow"
    interval_share: float = 0.75
    average_decay: float = 0.997
    optimizer: OptimizerName = "muon"
    weight_decay: float = 0.0
    student_forwards: tuple[int, ...] = (1, 2, 4, 8)
    ode_forwards: tuple[int, ...] = (16,)
    few_step: FewStep = "chain"
    promote: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _as_tuples(self, "student_forwards", "ode_forwards")
        require_choice("module.target", self.target, get_args(FlowTarget))
        require_choice("module.jvp_backend", self.jvp_backend, get_args(JvpBackend))
        require_choice("module.few_step", self.few_step, get_args(FewStep))
        require_choice("module.coupling", self.coupling, get_args(Coupling))
        require_shares(growth=self.growth, observed_share=self.observed_share)
        require_shares(diagonal_share=self.diagonal_share, endpoint_share=self.endpoint_share, together=True)
        require_at_least(0, module__recent_texts=self.recent_texts, module__teacher_weight=self.teacher_weight)
        require_at_least(1, module__ode_steps=self.ode_steps, module__lora_rank=self.lora_rank)
        _require_prompt_and_step(self)
        require_at_least(1, module__pair_reuse=self.pair_reuse, module__pair_window=self.pair_window)
        require_flow_options(self.few_step, self.promote, (*self.student_forwards, *self.ode_forwards))
        if not 0 <= self.interval_share < 1:
            raise UsageError(f"module.interval_share={self.interval_share} must be at least 0 and below 1")
        if self.rho_min <= 0:
            raise UsageError(f"module.rho_min={self.rho_min} must be above 0")
        if not 0 < self.meanflow_until < 1:
            raise UsageError(
                f"module.meanflow_until={self.meanflow_until} must lie between 0 and 1: the identity needs t < 1"
            )


@dataclass(frozen=True, kw_only=True)
class LogitFlowOptions(TeacherOptions):
    """Options of `LogitFlowModule`.

    prompt_*: see `PrefixStudent`. loss: kl | ce | mse | hard; the target of `hard` is the argmax of the flow's target
    (hard_target=flow) or the clean token (data). data_weight: adds cross entropy against the clean tokens.
    tangent: path (the masking process' own drift) | sample, argmax, random (the same with one token's embedding) | source (as
        first written down). See `masking_path_tangent`.
    correction_limit: bound on the target's distance from the teacher's logits, root mean square over the vocabulary; None
        for no bound. See `meanflow_target`.
    time_law, equal_share, endpoint_share: how (r, t) are drawn, see `sample_interval`.
    weighting: none | inverse_p (1/p as in the diffusion loss) | adaptive (`adaptive_weight`).
    jvp_backend, jvp_step: see `value_and_jvp`. eps: the least probability of a mask.
    lr, weight_decay, warmup_steps: see `LeapModule`.
    forwards, teacher_*: the teacher's rows in the table, see `TeacherOptions`.
    """

    prompt_length: int = 16
    prompt_hidden_size: int = 128
    prompt_rank: int = 32
    loss: FlowLoss = "kl"
    hard_target: Literal["flow", "data"] = "flow"
    data_weight: float = 0.0
    tangent: Tangent = "path"
    correction_limit: float | None = 1.0
    time_law: TimeLaw = "uniform"
    equal_share: float = 0.5
    endpoint_share: float = 0.25
    weighting: Weighting = "none"
    jvp_backend: JvpBackend = "forward_ad"
    jvp_step: float = 1e-2
    eps: float = 1e-3
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("module.loss", self.loss, get_args(FlowLoss))
        require_choice("module.hard_target", self.hard_target, ("flow", "data"))
        require_choice("module.tangent", self.tangent, get_args(Tangent))
        require_choice("module.weighting", self.weighting, get_args(Weighting))
        require_choice("module.jvp_backend", self.jvp_backend, get_args(JvpBackend))
        require_choice("module.time_law", self.time_law, get_args(TimeLaw))
        require_shares(equal_share=self.equal_share, endpoint_share=self.endpoint_share, together=True)
        require_shares(eps=self.eps)
        require_at_least(0, module__data_weight=self.data_weight)
        _require_prompt_and_step(self)
        if self.correction_limit is not None and self.correction_limit <= 0:
            raise UsageError(f"module.correction_limit={self.correction_limit} must be above 0; type null for no limit")


@dataclass(frozen=True, kw_only=True)
class StepHalvingOptions(TeacherOptions):
    """Options of `StepHalvingModule`.

    start_forwards: forward passes of the teacher's own sampler in the first round, a power of two above 1.
    adapter, lora_rank: see `MaskedStudent`. lr: peak of every round. average_decay: weight of the past in the average.
    forwards, teacher_*: the teacher's rows in the table, see `TeacherOptions`; the student's sampler has the same temperature
    and remasking, no guidance and one block. student_forwards: the student's rows.
    """

    start_forwards: int = 16
    adapter: MaskedAdapter = "full"
    lora_rank: int = 16
    lr: float = 1e-3
    average_decay: float = 0.99
    weight_decay: float = 0.0
    student_forwards: tuple[int, ...] = (1, 2, 4, 8)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _as_tuples(self, "student_forwards")
        require_at_least(1, module__lora_rank=self.lora_rank)
        if self.start_forwards < 2 or self.start_forwards & (self.start_forwards - 1):
            raise UsageError(f"module.start_forwards={self.start_forwards} must be a power of two above 1, such as 16")


def _require_prompt_and_step(options: NoisyMaskFlowOptions | LogitFlowOptions) -> None:
    """Raise UsageError for sizes of the trained prompt below 1, and for a step of finite differences that is none."""
    names = ("prompt_length", "prompt_hidden_size", "prompt_rank")
    require_at_least(1, **{f"module__{name}": getattr(options, name) for name in names})
    if options.jvp_step <= 0:
        raise UsageError(f"module.jvp_step={options.jvp_step} must be above 0, such as 1e-2")
