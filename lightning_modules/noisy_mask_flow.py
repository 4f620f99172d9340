"""The noisy-mask flow in three stages: adapt the teacher to noise, learn the flow map, polish its endpoint.

Times are data times, 0 = noisy mask, 1 = clean text.
"""

from collections.abc import Mapping
from typing import Any, get_args

from torch import Generator, Tensor

from lightning_modules.staged_distill import StagedDistillModule
from lightning_modules.training.optimizers import OptimizerName
from lightning_modules.training.stages import Stages
from models.backbones.llada import LladaModel
from models.diffusion.sampler import Remasking
from models.flow.endpoint_pairs import Coupling, EndpointPairs
from models.flow.losses import (
    FlowTarget,
    adapt_to_noise,
    consistency_gap,
    match_flow_map,
    match_intervals,
    noisy_point,
    polish_endpoint,
)
from models.flow.noisy_mask_student import Adapter, NoisyMaskStudent
from models.flow.probes import NoiseProbe
from models.flow.recent_texts import RecentTexts
from models.flow.solver import FewStep, NoisyMaskDecoder, require_flow_options
from models.functional.errors import UsageError, require_at_least, require_choice
from models.functional.flow_times import require_shares
from models.functional.jvp import JvpBackend
from models.interfaces.decoder import Decoder
from models.interfaces.objective import Terms

STAGES = ("adapt", "flow", "polish")


class NoisyMaskFlowModule(StagedDistillModule):
    """Trains a `NoisyMaskStudent` through the stages adapt, flow and polish.

    adapter, sigma, prompt_*, lora_rank: see `NoisyMaskStudent`. time_center: where tokens become decodable, see `warp_time`.
    stages: share of trainer.max_steps and learning rate of adapt, flow and polish; share 0 leaves a stage out. Without
        `adapt` the student that training starts from (student_path=...) is the denoiser.
    teacher_weight: lambda of KL(teacher || psi_{0,0}). observed_share: rows with part of the response given.
    recent_texts: adapt averages its targets over so many texts of the last batches of the epoch, as far as they
        have the row's prompt and could lie behind its point (`token_posterior`); 0 leaves each row its own text.
    target: meanflow (with derivatives, rho_min bounds it) for intervals that end by meanflow_until, psd beyond; or psd for all.
    diagonal_share, endpoint_share: rows with s = t, and from s = 0 to the widest end. growth: the share of the flow stage
        after which intervals may span all of [0, 1]. weighted: gap weights, see `gap_weight`.
    ode_steps, pair_reuse, pair_window, coupling: see `EndpointPairs`. interval_share: rows of a polishing step that makes
        pairs by following flows, which learn intervals of these (`FlowIntervals`) in the place of endpoints: the jumps of
        student_forwards, where these divide ode_steps.
    student_forwards: the student's rows in the table, and what its jumps are learned for.
    ode_forwards: rows of the denoiser's flow, which one forward imitates.
    """

    snapshots = ("average", "denoiser")

    def __init__(
        self,
        teacher: LladaModel,
        *,
        adapter: Adapter = "full",
        sigma: float = 2.0,
        time_center: float = 0.5,
        prompt_length: int = 8,
        prompt_hidden_size: int = 128,
        prompt_rank: int = 32,
        lora_rank: int = 16,
        stages: Mapping[str, Mapping[str, float]],
        teacher_weight: float = 0.02,
        recent_texts: int = 1024,
        observed_share: float = 0.1,
        target: FlowTarget = "meanflow",
        meanflow_until: float = 0.95,
        rho_min: float = 0.05,
        jvp_backend: JvpBackend = "forward_ad",
        jvp_step: float = 1e-2,
        diagonal_share: float = 0.25,
        endpoint_share: float = 0.25,
        growth: float = 0.5,
        weighted: bool = False,
        ode_steps: int = 8,
        pair_reuse: int = 4,
        pair_window: int = 16,
        coupling: Coupling = "flow",
        interval_share: float = 0.75,
        average_decay: float = 0.997,
        optimizer: OptimizerName = "muon",
        weight_decay: float = 0.0,
        forwards: tuple[int, ...] = (1, 2, 4, 8, 16),
        student_forwards: tuple[int, ...] = (1, 2, 4, 8),
        ode_forwards: tuple[int, ...] = (16,),
        few_step: FewStep = "chain",
        promote: float | None = None,
        teacher_temperature: float = 1.0,
        teacher_remasking: Remasking = "random",
        seed: int = 0,
    ) -> None:
        require_choice("module.target", target, get_args(FlowTarget))
        require_choice("module.jvp_backend", jvp_backend, get_args(JvpBackend))
        require_shares(growth=growth, observed_share=observed_share)
        require_shares(diagonal_share=diagonal_share, endpoint_share=endpoint_share, together=True)
        if not 0 <= interval_share < 1 or teacher_weight < 0 or rho_min <= 0:
            raise UsageError(
                f"module.interval_share={interval_share} must be at least 0 and below 1, "
                f"module.teacher_weight={teacher_weight} at least 0 and module.rho_min={rho_min} above 0"
            )
        require_choice("module.few_step", few_step, get_args(FewStep))
        require_flow_options(few_step, promote, (*student_forwards, *ode_forwards))
        require_at_least(0, module__recent_texts=recent_texts)
        if not 0 < meanflow_until < 1:
            raise UsageError(
                f"module.meanflow_until={meanflow_until} must lie between 0 and 1: its identity ends before t = 1"
            )
        sizes = {"prompt_length": prompt_length, "hidden_size": prompt_hidden_size, "rank": prompt_rank}
        noise = {"sigma": sigma, "time_center": time_center}
        student = NoisyMaskStudent(teacher, adapter=adapter, lora_rank=lora_rank, **noise, **sizes)
        super().__init__(
            student,
            Stages(stages, STAGES),
            average_decay=average_decay,
            optimizer=optimizer,
            weight_decay=weight_decay,
            forwards=forwards,
            teacher_temperature=teacher_temperature,
            teacher_remasking=teacher_remasking,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["teacher"])
        self.interval_share, self.growth = interval_share, growth
        self.adapt_options = {"observed_share": observed_share, "teacher_weight": teacher_weight}
        self.texts = RecentTexts(recent_texts) if recent_texts else None
        self.flow_options = {
            "observed_share": observed_share,
            "diagonal_share": diagonal_share,
            "endpoint_share": endpoint_share,
            "weighted": weighted,
            "target": target,
            "meanflow_until": meanflow_until,
            "rho_min": rho_min,
            "jvp_backend": jvp_backend,
            "jvp_step": jvp_step,
        }
        self.pairs = EndpointPairs(
            ode_steps=ode_steps,
            reuse=pair_reuse,
            window=pair_window,
            coupling=coupling,
            observed_share=observed_share,
            student_forwards=student_forwards,
            few_step=few_step,
        )
        self.student_forwards, self.ode_forwards = tuple(student_forwards), tuple(ode_forwards)
        self.few_step, self.promote = few_step, promote
        self.denoiser: dict[str, Tensor] = {}

    def instead_of_forward_derivatives(self) -> str | None:
        taken = self.flow_options["target"] == "meanflow" and self.flow_options["jvp_backend"] == "forward_ad"
        return "module.target=psd" if taken else None

    # -- the three stages -------------------------------------------------------------------------------------------

    def stage_terms(self, stage: str, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        return {"adapt": self._adapt, "flow": self._flow, "polish": self._polish}[stage](batch, progress, generator)

    def on_stage_begin(self, stage: str) -> None:
        """Whatever `adapt` left, or training started from, is the denoiser from then on."""
        if self.denoiser or stage == "adapt":
            return
        gate = self.student.mask_noise
        if gate is not None and not bool(gate.weight.any()):
            raise UsageError(
                f"the {stage} stage needs a student that reads noise, and this one was never adapted; give "
                "module.stages.adapt a share, or type student_path=<a student that was adapted>"
            )
        self.denoiser = self.student.trainable()

    def _adapt(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        texts = None if self.texts is None else self.texts.add(batch["input_ids"], self.current_epoch)
        return adapt_to_noise(self.student, self.teacher, batch, generator, texts=texts, **self.adapt_options)

    def _flow(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        widest = min(1.0, 0.1 + 0.9 * progress / self.growth) if self.growth else 1.0
        networks = (self.network(self.average), self.network(self.denoiser))
        return match_flow_map(self.student, *networks, batch, generator, widest=widest, **self.flow_options)

    def _polish(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        rows = len(batch["input_ids"])
        n = min(round(self.interval_share * rows), rows - 1)
        # 1. pairs of noise and the text where its flow ends
        pairs, intervals = self.pairs.draw(self.student, self.network(self.denoiser), batch, generator, n)
        if intervals is None:
            return polish_endpoint(self.student, *pairs)
        # 2. where flows were followed for fresh pairs, most rows learn what was on the way
        on_the_way = match_intervals(self.student, intervals)
        terms = polish_endpoint(self.student, *(column[n:] for column in pairs))
        return Terms((1 - n / rows) * terms.loss + n / rows * on_the_way.loss, terms.raw | on_the_way.raw)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The average's denoising loss on held-out rows, whatever the stage: it must not get worse after `adapt`."""
        generator = self.step_generator(batch_idx, stream=1, epoch=0)
        options = self.adapt_options | {"teacher_weight": 0.0}
        with self.averaged():
            terms = adapt_to_noise(self.student, self.teacher, batch, generator, **options)
        for name, value in {"loss": terms.loss, **terms.raw}.items():
            self.log(f"val/{name}", value, prog_bar=name == "loss", batch_size=len(batch["input_ids"]), sync_dist=True)

    @property
    def probes(self) -> tuple[NoiseProbe]:
        return (NoiseProbe(self.student),)

    # -- what a monitor looks at ------------------------------------------------------------------------------------

    def answer(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        """Responses (B, R) in one forward from fresh noise."""
        return NoisyMaskDecoder(self.student, 1)(rows, generator)

    def points(self, rows: dict[str, Tensor], s: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """z_s (B, L, D) of whole responses, and where they are masked (B, L)."""
        masked = rows["response_mask"]
        return noisy_point(self.student, rows, masked, s, generator), masked

    def consistency_gap(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        """How far one jump from noise to text is from two, nats per position."""
        return consistency_gap(self.student, rows, generator)

    # -- checkpoints and decoders -----------------------------------------------------------------------------------

    def stage_state(self) -> dict[str, Any]:
        state = super().stage_state() | {"pairs": self.pairs.state_dict()}
        return state | ({} if self.texts is None else {"texts": self.texts.state_dict()})

    def load_stage_state(self, state: dict[str, Any]) -> None:
        super().load_stage_state(state)
        if self.trainer.world_size == 1:  # a checkpoint holds rank 0's own: several ranks begin with fresh ones
            self.pairs.load_state_dict(state["pairs"])
            if self.texts is not None and "texts" in state:
                self.texts.load_state_dict(state["texts"])

    def decoders(self) -> list[Decoder]:
        options = {"step": self.few_step, "promote": self.promote}
        chains = [NoisyMaskDecoder(self.student, n, **options) for n in self.student_forwards]
        # before the flow stage the denoiser is the student itself
        denoiser = self.network(self.denoiser) if self.denoiser else None
        odes = [NoisyMaskDecoder(self.student, n, step="ode", network=denoiser) for n in self.ode_forwards]
        return [*self.teacher_decoders(), *chains, *odes]
