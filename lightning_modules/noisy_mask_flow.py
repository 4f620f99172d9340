"""The noisy-mask flow in three stages: adapt the teacher to noise, learn the flow map, polish its endpoint.

Times are data times, 0 = noisy mask, 1 = clean text.
"""

from dataclasses import asdict, replace
from typing import Any, ClassVar

from torch import Generator, Tensor

from lightning_modules.staged_distill import StagedDistillModule
from lightning_modules.training.stages import Stages
from models.backbones.llada import LladaModel
from models.flow.endpoint_pairs import EndpointPairs
from models.flow.losses import adapt_to_noise, match_flow_map, match_intervals, polish_endpoint
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.options import NoisyMaskFlowOptions
from models.flow.probes import FlowProbe, NoiseProbe
from models.flow.recent_texts import RecentTexts
from models.flow.solver import NoisyMaskDecoder
from models.functional.errors import UsageError
from models.interfaces.decoder import Decoder
from models.interfaces.objective import Terms

STAGES = ("adapt", "flow", "polish")


class NoisyMaskFlowModule(StagedDistillModule):
    """Trains a `NoisyMaskStudent` through the stages adapt, flow and polish; its options are `NoisyMaskFlowOptions`."""

    options_class: ClassVar[type] = NoisyMaskFlowOptions
    snapshots = ("average", "denoiser")

    def __init__(self, teacher: LladaModel, options: NoisyMaskFlowOptions | None = None, **changes: Any) -> None:
        o = replace(options or NoisyMaskFlowOptions(), **changes)
        student = NoisyMaskStudent(
            teacher,
            adapter=o.adapter,
            noise_read=o.noise_read,
            sigma=o.sigma,
            time_center=o.time_center,
            prompt_length=o.prompt_length,
            hidden_size=o.prompt_hidden_size,
            rank=o.prompt_rank,
            lora_rank=o.lora_rank,
        )
        super().__init__(
            student,
            Stages(o.stages, STAGES),
            average_decay=o.average_decay,
            optimizer=o.optimizer,
            weight_decay=o.weight_decay,
            teacher_sampling=o.teacher_sampling,
            seed=o.seed,
        )
        self.save_hyperparameters(asdict(o))
        self.options = o
        self.texts = RecentTexts(o.recent_texts) if o.recent_texts else None
        self.pairs = EndpointPairs(
            ode_steps=o.ode_steps,
            reuse=o.pair_reuse,
            window=o.pair_window,
            coupling=o.coupling,
            observed_share=o.observed_share,
            student_forwards=o.student_forwards,
            few_step=o.few_step,
        )
        self.denoiser: dict[str, Tensor] = {}
        self.probes = (NoiseProbe(student), FlowProbe(student))

    def instead_of_forward_derivatives(self) -> str | None:
        taken = self.options.target == "meanflow" and self.options.jvp_backend == "forward_ad"
        return "module.target=psd" if taken else None

    # -- the three stages -------------------------------------------------------------------------------------------

    def stage_terms(self, stage: str, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        return {"adapt": self._adapt, "flow": self._flow, "polish": self._polish}[stage](batch, progress, generator)

    def on_stage_begin(self, stage: str) -> None:
        """The first stage after `adapt` freezes the student that it starts from as the denoiser."""
        if self.denoiser or stage == "adapt":
            return
        gate = self.student.mask_noise
        if gate is not None and not bool(gate.weight.any()):
            raise UsageError(
                f"the {stage} stage needs a student that was adapted to noise, and this one was never adapted; give "
                "module.stages.adapt a share, or type student_path=<a student that was adapted>"
            )
        self.denoiser = self.student.trainable()

    def _adapt(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        texts = None if self.texts is None else self.texts.add(batch["input_ids"], self.current_epoch)
        return self._denoising_terms(batch, generator, self.options.teacher_weight, texts)

    def _flow(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        growth = self.options.growth
        widest = min(1.0, 0.1 + 0.9 * progress / growth) if growth else 1.0
        average, denoiser = self.network(self.average), self.network(self.denoiser)
        return match_flow_map(self.student, average, denoiser, batch, generator, self.options, widest=widest)

    def _polish(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        rows = len(batch["input_ids"])
        n = min(round(self.options.interval_share * rows), rows - 1)
        # 1. pairs of noise and the text where its flow ends
        denoiser = self.network(self.denoiser)
        pairs, intervals = self.pairs.draw(self.student.path, denoiser, batch, generator, n)
        if intervals is None:
            return polish_endpoint(self.student, pairs)
        # 2. where flows were followed for new pairs, most rows learn intervals of these flows
        along = match_intervals(self.student, intervals)
        ends = polish_endpoint(self.student, pairs.rows(slice(n, None)))
        return Terms((1 - n / rows) * ends.loss + n / rows * along.loss, ends.raw | along.raw)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The average's denoising loss on held-out rows, in every stage: it must not get worse after `adapt`."""
        generator = self.step_generator(batch_idx, stream=1, epoch=0)
        with self.averaged():
            terms = self._denoising_terms(batch, generator, teacher_weight=0.0)
        for name, value in {"loss": terms.loss, **terms.raw}.items():
            self.log(f"val/{name}", value, prog_bar=name == "loss", batch_size=len(batch["input_ids"]), sync_dist=True)

    def _denoising_terms(
        self, batch: dict[str, Tensor], generator: Generator, teacher_weight: float, texts: Tensor | None = None
    ) -> Terms:
        shares = {"teacher_weight": teacher_weight, "observed_share": self.options.observed_share}
        return adapt_to_noise(self.student, self.teacher, batch, generator, texts=texts, **shares)

    # -- checkpoints and decoders -----------------------------------------------------------------------------------

    def stage_state(self) -> dict[str, Any]:
        state = super().stage_state() | {"pairs": self.pairs.state_dict()}
        return state | ({} if self.texts is None else {"texts": self.texts.state_dict()})

    def load_stage_state(self, state: dict[str, Any]) -> None:
        super().load_stage_state(state)
        if self.trainer.world_size == 1:  # a checkpoint holds those of rank 0 alone; several ranks begin without
            self.pairs.load_state_dict(state["pairs"])
            if self.texts is not None and "texts" in state:
                self.texts.load_state_dict(state["texts"])

    def decoders(self) -> list[Decoder]:
        o = self.options
        students = [NoisyMaskDecoder(self.student, n, step=o.few_step, promote=o.promote) for n in o.student_forwards]
        # before the flow stage the denoiser is the student itself
        denoiser = self.network(self.denoiser) if self.denoiser else None
        flows = [NoisyMaskDecoder(self.student, n, step="ode", network=denoiser) for n in o.ode_forwards]
        return [*self.teacher_decoders(), *students, *flows]
