"""The noisy-mask flow in three stages: adapt the teacher to noise, learn the flow map, polish its endpoint.

All stages are one training: a step count decides which stage a step belongs to, so one progress bar, one checkpoint and one
`ckpt_path=last` serve them all. Times are data times, 0 = noisy mask, 1 = clean text.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Generator, Tensor

from lightning_modules.meanflow_distill import MeanFlowDistillModule, require_choice
from lightning_modules.stages import Stages
from models.backbones.llada import LladaModel
from models.backbones.noisy_mask_student import Adapter, NoisyMaskStudent
from models.decoding.decoder import Decoder
from models.decoding.masked_diffusion import Remasking
from models.decoding.noisy_mask import Network, NoisyMaskDecoder, Step
from models.functional.errors import UsageError
from models.functional.jvp import JvpBackend
from models.objectives.endpoint_pairs import Coupling, EndpointPairs
from models.objectives.noisy_mask import FlowTarget, Terms, adapt_to_noise, match_flow_map, polish_endpoint


class NoisyMaskFlowModule(MeanFlowDistillModule):
    """Trains a `NoisyMaskStudent`; it keeps the running average of the weights itself, because targets are made with it.

    adapter, sigma, prompt_*, lora_rank: see `NoisyMaskStudent`. time_center: where tokens become decodable, see `warp_time`.
    stages: share of trainer.max_steps and learning rate of adapt, flow and polish; share 0 leaves a stage out. Without
        `adapt` the student that training starts from (student_path=...) is the denoiser.
    teacher_weight: lambda of KL(teacher || psi_{0,0}). observed_share: rows with part of the response given.
    target: psd | meanflow (with derivatives) for intervals that end by meanflow_until, psd beyond; rho_min bounds it.
    diagonal_share, endpoint_share: rows with s = t, and from s = 0 to the widest end. growth: the share of the flow stage
        after which intervals may span all of [0, 1]. weighted: gap weights, see `gap_weight`.
    ode_steps, pair_reuse, pair_window, coupling: see `EndpointPairs`. keep_share: rows of a polishing batch that go on with
        the flow map, so that more than one forward stays as good as it was.
    student_forwards: the student's rows in the table; ode_forwards: rows of the denoiser's own flow, the student's ceiling.
    """

    def __init__(
        self,
        teacher: LladaModel,
        *,
        adapter: Adapter = "full",
        sigma: float = 4.0,
        time_center: float = 0.5,
        prompt_length: int = 8,
        prompt_hidden_size: int = 128,
        prompt_rank: int = 32,
        lora_rank: int = 16,
        stages: Mapping[str, Mapping[str, float]],
        teacher_weight: float = 0.1,
        observed_share: float = 0.1,
        target: FlowTarget = "psd",
        meanflow_until: float = 0.95,
        rho_min: float = 0.05,
        jvp_backend: JvpBackend = "forward_ad",
        jvp_step: float = 1e-2,
        diagonal_share: float = 0.25,
        endpoint_share: float = 0.25,
        growth: float = 0.5,
        weighted: bool = False,
        ode_steps: int = 16,
        pair_reuse: int = 4,
        pair_window: int = 16,
        coupling: Coupling = "flow",
        keep_share: float = 0.25,
        average_decay: float = 0.99,
        weight_decay: float = 0.0,
        forwards: tuple[int, ...] = (1, 2, 4, 8, 16),
        student_forwards: tuple[int, ...] = (1, 2, 4, 8),
        ode_forwards: tuple[int, ...] = (16,),
        few_step: Step = "chain",
        promote: float | None = None,
        teacher_temperature: float = 1.0,
        teacher_remasking: Remasking = "random",
        seed: int = 0,
    ) -> None:
        require_choice("target", target, get_args(FlowTarget))
        require_choice("few_step", few_step, get_args(Step))
        require_choice("jvp_backend", jvp_backend, get_args(JvpBackend))
        for name, share in (("keep_share", keep_share), ("growth", growth), ("observed_share", observed_share)):
            if not 0 <= share <= 1:
                raise UsageError(f"module.{name}={share} must lie between 0 and 1")
        if not 0 < meanflow_until < 1:
            raise UsageError(
                f"module.meanflow_until={meanflow_until} must lie between 0 and 1: its identity ends before t = 1"
            )
        if diagonal_share + endpoint_share > 1:
            raise UsageError(
                f"module.diagonal_share + module.endpoint_share = {diagonal_share + endpoint_share} exceeds 1"
            )
        sizes = {"prompt_length": prompt_length, "hidden_size": prompt_hidden_size, "rank": prompt_rank}
        noise = {"sigma": sigma, "time_center": time_center}
        student = NoisyMaskStudent(teacher, adapter=adapter, lora_rank=lora_rank, **noise, **sizes)
        planned = Stages(stages)
        super().__init__(
            student,
            lr=max(stage.lr for stage in planned.all),
            weight_decay=weight_decay,
            warmup_steps=0,
            forwards=forwards,
            teacher_temperature=teacher_temperature,
            teacher_remasking=teacher_remasking,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["teacher"])
        self.stages = planned
        self.keep_share, self.growth = keep_share, growth
        self.average_decay = average_decay
        self.adapt_options = {"observed_share": observed_share, "teacher_weight": teacher_weight}
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
        self.pairs = EndpointPairs(ode_steps=ode_steps, reuse=pair_reuse, window=pair_window, coupling=coupling)
        self.student_forwards, self.ode_forwards = tuple(student_forwards), tuple(ode_forwards)
        self.few_step, self.promote = few_step, promote
        self.stage_begun: str | None = None
        self.average: dict[str, Tensor] = {}
        self.denoiser: dict[str, Tensor] = {}

    # -- the three stages -------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        stage, progress = self.stages.at(self.global_step)
        if stage.name != self.stage_begun:
            self._begin(stage.name)
        generator = self.step_generator(batch_idx)
        terms = {"adapt": self._adapt, "flow": self._flow, "polish": self._polish}[stage.name](
            batch, progress, generator
        )
        rows = len(batch["input_ids"])
        self.log("train/loss", terms.loss, prog_bar=True, batch_size=rows)
        for name, value in terms.raw.items():
            self.log(f"train/{name}", value, batch_size=rows)
        return self.refuse_nan(terms.loss)

    def _begin(self, stage: str) -> None:
        """A stage starts from the average that the one before it left, with a fresh optimizer state."""
        if self.stage_begun is not None:
            self._put(self.average)
            self.optimizers().optimizer.state.clear()
        if not self.denoiser and stage != "adapt":
            self.denoiser = self.student.trainable()
        self.average = self.student.trainable()
        self.average_steps = 0
        self.stage_begun = stage

    def _adapt(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        return adapt_to_noise(self.student, self.teacher, batch, generator, **self.adapt_options)

    def _flow(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        widest = min(1.0, 0.1 + 0.9 * progress / self.growth) if self.growth else 1.0
        networks = (self.network(self.average), self.network(self.denoiser))
        return match_flow_map(self.student, *networks, batch, generator, widest=widest, **self.flow_options)

    def _polish(self, batch: dict[str, Tensor], progress: float, generator: Generator) -> Terms:
        # 1. pairs of noise and the text where its flow ends
        pairs = self.pairs.draw(self.student, self.network(self.denoiser), batch, generator)
        kept = round(self.keep_share * len(pairs[0]))
        terms = polish_endpoint(self.student, *(column[kept:] for column in pairs))
        if kept == 0:
            return terms
        # 2. the flow map goes on, on the other rows
        few = {name: column[:kept] for name, column in batch.items()}
        flow = self._flow(few, self.growth or 1.0, generator)
        share = kept / len(pairs[0])
        return Terms((1 - share) * terms.loss + share * flow.loss, terms.raw | flow.raw)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The average's denoising loss on held-out rows, whatever the stage: it must not get worse after `adapt`."""
        generator = self.step_generator(batch_idx, stream=1, epoch=0)
        options = self.adapt_options | {"teacher_weight": 0.0}
        with self.averaged():
            terms = adapt_to_noise(self.student, self.teacher, batch, generator, **options)
        for name, value in {"loss": terms.loss, **terms.raw}.items():
            self.log(f"val/{name}", value, prog_bar=name == "loss", batch_size=len(batch["input_ids"]), sync_dist=True)

    # -- weights ----------------------------------------------------------------------------------------------------

    def network(self, weights: dict[str, Tensor]) -> Network:
        """The student evaluated with other weights."""
        return partial(self.student.with_weights, weights)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Projection and average are part of the step: checkpoints must not see one without the other."""
        super().optimizer_step(*args, **kwargs)
        self.student.soft_prompt.project_()
        self.average_steps += 1
        decay = min(self.average_decay, (1 + self.average_steps) / (10 + self.average_steps))
        for name, p in self.student.named_parameters():
            if p.requires_grad:
                self.average[name].lerp_(p.detach(), 1 - decay)

    def configure_optimizers(self) -> dict[str, Any]:
        self.stages.plan(int(self.trainer.estimated_stepping_batches))
        parts = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(parts["optimizer"], lambda step: self.stages.lr(step) / self.lr)
        return parts | {"lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def averaged(self) -> "_Averaged":
        """Within this context the student has its average weights."""
        return _Averaged(self)

    def on_train_end(self) -> None:
        self._put(self.average)

    def on_test_start(self) -> None:
        if self.average:
            self._put(self.average)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.student.named_parameters():
            if name in weights:
                p.copy_(weights[name])

    # -- checkpoints and decoders -----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = {"stage": self.stage_begun, "average": self.average, "denoiser": self.denoiser}
        checkpoint["noisy_mask_flow"] = state | {"steps": self.average_steps, "pairs": self.pairs.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["noisy_mask_flow"]
        self.stage_begun, self.average_steps = state["stage"], state["steps"]
        self.average, self.denoiser = (
            {name: weight.to(self.device) for name, weight in state[part].items()} for part in ("average", "denoiser")
        )
        self.pairs.load_state_dict(state["pairs"])

    def decoders(self) -> list[Decoder]:
        options = {"step": self.few_step, "promote": self.promote}
        chains = [NoisyMaskDecoder(self.student, n, **options) for n in self.student_forwards]
        odes = [NoisyMaskDecoder(self.student, n, step="ode") for n in self.ode_forwards]
        return [*self.teacher_decoders(), *chains, *odes]


class _Averaged:
    def __init__(self, module: NoisyMaskFlowModule) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.raw = self.module.student.trainable()
        self.module._put(self.module.average)

    def __exit__(self, *_: Any) -> None:
        self.module._put(self.raw)
