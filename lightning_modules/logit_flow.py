"""The logit flow: a student learns the average of a masked teacher's logits along its masking path.

Legend: B batch, L length, M masked positions, D width, V vocabulary. Times: t = 1 noise, r <= t.
"""

from dataclasses import asdict, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from lightning_modules.meanflow_distill import MeanFlowDistillModule
from models.backbones.llada import LladaModel
from models.flow.one_step import OneStepDecoder
from models.flow.options import LogitFlowOptions
from models.flow.prefix_student import PrefixStudent
from models.functional.flow_times import sample_interval
from models.functional.jvp import value_and_jvp
from models.functional.masked_diffusion import mask_probability, mask_tokens, row_of_masked
from models.functional.meanflow import (
    adaptive_weight,
    clean_embedding,
    flow_loss,
    masking_path_tangent,
    meanflow_target,
)
from models.interfaces.decoder import Decoder
from models.interfaces.objective import mean_of


class MaskingSample(NamedTuple):
    """Rows of the masking process at times t, and the intervals [r, t] that the student averages over.

    z (B, L, D): embeddings of x_t. masked, attention_mask, response_mask (B, L) bool. r, t (B,). p (B,): that of a mask at t.
    n_equal: the first rows have r = t.
    """

    z: Tensor
    masked: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    r: Tensor
    t: Tensor
    p: Tensor
    n_equal: int


class LogitFlowModule(MeanFlowDistillModule):
    """Trains the soft prompt of a `PrefixStudent` over a frozen teacher; its options are `LogitFlowOptions`.

    It suits prompts that (nearly) determine the response. Elsewhere one forward pass from a fixed all-mask response
    factorises over positions: it cannot be nearer to the truth, in KL, than the product of marginals.
    """

    options_class: ClassVar[type] = LogitFlowOptions

    def __init__(self, teacher: LladaModel, options: LogitFlowOptions | None = None, **changes: Any) -> None:
        o = replace(options or LogitFlowOptions(), **changes)
        super().__init__(
            PrefixStudent(teacher, prompt_length=o.prompt_length, hidden_size=o.prompt_hidden_size, rank=o.prompt_rank),
            lr=o.lr,
            weight_decay=o.weight_decay,
            warmup_steps=o.warmup_steps,
            teacher_sampling=o.teacher_sampling,
            seed=o.seed,
        )
        self.save_hyperparameters(asdict(o))
        self.options = o

    def instead_of_forward_derivatives(self) -> str | None:
        taken = self.options.jvp_backend == "forward_ad" and self.options.equal_share < 1
        return "module.jvp_backend=finite_difference" if taken else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._step(batch, self.step_generator(batch_idx), "train")
        self.log("monitor/gate_mean", self.student.soft_prompt.gate.mean())
        return self.refuse_nan(loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, self.step_generator(batch_idx, stream=1), "val")

    def _step(self, batch: dict[str, Tensor], generator: Generator, split: str) -> Tensor:
        o, x0 = self.options, batch["input_ids"]
        attention_mask, response_mask = batch["attention_mask"], batch["response_mask"]
        # 1. an interval for each row and the text corrupted at its noisy end
        shares = {"equal_share": o.equal_share, "endpoint_share": o.endpoint_share}
        r, t, n_equal = sample_interval(len(x0), generator, x0.device, law=o.time_law, **shares)
        p = mask_probability(t, o.eps)
        xt, masked = mask_tokens(x0, response_mask, p, self.teacher.mask_id, generator)
        row = row_of_masked(masked)  # (M,)
        z = self.teacher.embed(xt).detach()
        sample = MaskingSample(z, masked, attention_mask, response_mask, r, t, p, n_equal)
        # 2. instantaneous logits v of the teacher at the masked positions
        with torch.no_grad():
            hidden = self.teacher.hidden(z, attention_mask, response_mask=response_mask)
            v = self.teacher.lm_head(hidden[masked])  # (M, V)
        # 3. average logits u of the student and du/dt along the masking path (zero weight where r = t)
        u, du_dt = self.student_logits_and_derivative(sample, v, generator)
        # 4. the identity's right-hand side, held constant
        target = meanflow_target(v, du_dt, r[row], t[row], o.correction_limit)
        # 5. the distance, raw and weighted
        tokens = x0[masked]
        raw = flow_loss(u, target, o.loss, tokens if o.hard_target == "data" else None)
        if o.data_weight:
            raw = raw + o.data_weight * flow_loss(u, target, "hard", tokens)
        loss = mean_of(raw * self._weights(raw, p[row]))
        self._log_step(split, raw, loss, u, du_dt, (t - r)[row], tokens, len(x0))
        return loss

    def student_logits_and_derivative(
        self, sample: MaskingSample, v: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """u and du/dt at the masked positions, (M, V) each; rows with r = t (the first n_equal) skip the derivative.

        generator: of the tokens of tangents that draw one.
        A group without rows is computed for one row that does not count: every rank takes the same forward passes.
        """
        n, masked = sample.n_equal, sample.masked
        first, logits, derivatives = int(masked[:n].sum()), [], []
        if self.options.equal_share:
            rows = slice(0, max(1, n))
            logits.append(self._logits(sample, rows, sample.z[rows], sample.t[rows])[:first])
            derivatives.append(torch.zeros_like(logits[0]))
        if self.options.equal_share < 1:
            rows = slice(min(n, len(masked) - 1), len(masked))
            u, du_dt = self._logits_and_derivative(sample, rows, v[int(masked[: rows.start].sum()) :], generator)
            logits.append(u[: len(v) - first])
            derivatives.append(du_dt[: len(v) - first])
        return torch.cat(logits), torch.cat(derivatives)

    def _logits(self, sample: MaskingSample, rows: slice, z: Tensor, t: Tensor) -> Tensor:
        """u(z, r, t) at the masked positions of some rows."""
        masks = sample.attention_mask[rows], sample.response_mask[rows]
        hidden = self.student.hidden(z, masks[0], sample.r[rows], t, masks[1])
        return self.teacher.lm_head(hidden[sample.masked[rows]])

    def _logits_and_derivative(
        self, sample: MaskingSample, rows: slice, v: Tensor, generator: Generator | None
    ) -> tuple[Tensor, Tensor]:
        """u of some rows, and du/dt along the masking path; v: the teacher's logits at their masked positions."""
        z, masked, t = sample.z[rows], sample.masked[rows], sample.t[rows]
        p = sample.p[rows].unsqueeze(-1).expand(masked.shape)[masked]
        clean = clean_embedding(v, self.teacher.embedding, self.options.tangent, generator)
        drift = masking_path_tangent(z[masked], clean, p, self.options.eps, self.options.tangent)
        return value_and_jvp(
            lambda z, t: self._logits(sample, rows, z, t),
            (z, t),
            (torch.zeros_like(z).masked_scatter(masked.unsqueeze(-1), drift), torch.ones_like(t)),
            backend=self.options.jvp_backend,
            step=self.options.jvp_step,
        )

    def _weights(self, raw: Tensor, p: Tensor) -> Tensor:
        if self.options.weighting == "adaptive":
            return adaptive_weight(raw)
        return 1.0 / p if self.options.weighting == "inverse_p" else torch.ones_like(raw)

    def _log_step(
        self, split: str, raw: Tensor, loss: Tensor, u: Tensor, du_dt: Tensor, gap: Tensor, tokens: Tensor, rows: int
    ) -> None:
        sync = split == "val"
        self.log(f"{split}/loss", loss, prog_bar=True, batch_size=rows, sync_dist=sync)
        self.log(f"{split}/raw_loss", mean_of(raw), batch_size=rows, sync_dist=sync)
        accuracy = mean_of((u.detach().argmax(-1) == tokens).float())
        self.log(f"{split}/masked_accuracy", accuracy, prog_bar=True, batch_size=rows)
        self.log(f"monitor/{split}_correction", mean_of((gap.unsqueeze(-1) * du_dt).abs()), batch_size=rows)

    def decoders(self) -> list[Decoder]:
        students = [OneStepDecoder(self.student, temperature=temperature) for temperature in (1.0, 0.0)]
        return [*self.teacher_decoders(), *students]
