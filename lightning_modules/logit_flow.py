"""The logit flow: a student learns the average of a masked teacher's logits along its masking path.

Legend: B batch, L length, M masked positions, D width, V vocabulary. Times: t = 1 noise, r <= t.
"""

from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from lightning_modules.meanflow_distill import MeanFlowDistillModule
from models.backbones.llada import LladaModel
from models.diffusion.sampler import Remasking
from models.flow.one_step import OneStepDecoder
from models.flow.prefix_student import PrefixStudent
from models.functional.errors import require_choice
from models.functional.flow_times import TimeLaw, sample_interval
from models.functional.jvp import JvpBackend, value_and_jvp
from models.functional.masked_diffusion import mask_probability, mask_tokens, row_of_masked
from models.functional.meanflow import (
    FlowLoss,
    Tangent,
    adaptive_weight,
    expected_embedding,
    flow_loss,
    masking_path_tangent,
    meanflow_target,
)
from models.interfaces.decoder import Decoder

Weighting = Literal["none", "inverse_p", "adaptive"]


class LogitFlowModule(MeanFlowDistillModule):
    """Trains the soft prompt of a `PrefixStudent` over a frozen teacher; the teacher is the student's own base.

    It is a fine one-step generator where the prompt (nearly) determines the response; elsewhere one forward from a fixed
    all-mask response factorises over positions, and none can be nearer to the truth, in KL, than the product of marginals.

    loss: kl | ce | mse | hard; `hard_target` is argmax of the target (`flow`) or the clean token (`data`).
    data_weight: adds that much cross entropy against the clean tokens to any loss.
    tangent: path (the masking process' own drift) | source (as first written down; kept to be compared with).
    correction_limit: bound on the target's distance from the teacher's logits (root mean square over the vocabulary), null
        for none; see `meanflow_target`.
    time_law, equal_share, endpoint_share: how (r, t) are drawn, see `sample_interval`.
    weighting: none | inverse_p (1/p as in the diffusion loss) | adaptive (evens out scales).
    jvp_backend: forward_ad | finite_difference with step `jvp_step`.
    forwards, teacher_temperature, teacher_remasking: the teacher's rows in the final table.
    """

    def __init__(
        self,
        teacher: LladaModel,
        *,
        prompt_length: int = 16,
        prompt_hidden_size: int = 256,
        prompt_rank: int = 32,
        loss: FlowLoss = "kl",
        hard_target: Literal["flow", "data"] = "flow",
        data_weight: float = 0.0,
        tangent: Tangent = "path",
        correction_limit: float | None = 1.0,
        time_law: TimeLaw = "uniform",
        equal_share: float = 0.5,
        endpoint_share: float = 0.0,
        weighting: Weighting = "none",
        jvp_backend: JvpBackend = "forward_ad",
        jvp_step: float = 1e-2,
        eps: float = 1e-3,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        forwards: tuple[int, ...] = (1, 2, 4, 8, 16),
        teacher_temperature: float = 1.0,
        teacher_remasking: Remasking = "random",
        seed: int = 0,
    ) -> None:
        require_choice("module.loss", loss, get_args(FlowLoss))
        require_choice("module.hard_target", hard_target, ("flow", "data"))
        require_choice("module.tangent", tangent, get_args(Tangent))
        require_choice("module.weighting", weighting, get_args(Weighting))
        require_choice("module.jvp_backend", jvp_backend, get_args(JvpBackend))
        shares = {"law": time_law, "equal_share": equal_share, "endpoint_share": endpoint_share}
        sample_interval(4, torch.Generator().manual_seed(0), torch.device("cpu"), **shares)
        meanflow_target(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), torch.ones(1), correction_limit)
        super().__init__(
            PrefixStudent(teacher, prompt_length=prompt_length, hidden_size=prompt_hidden_size, rank=prompt_rank),
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            forwards=forwards,
            teacher_temperature=teacher_temperature,
            teacher_remasking=teacher_remasking,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["teacher"])
        self.loss, self.hard_target, self.data_weight, self.tangent = loss, hard_target, data_weight, tangent
        self.correction_limit = correction_limit
        self.time_law, self.equal_share, self.endpoint_share = time_law, equal_share, endpoint_share
        self.weighting, self.jvp_backend, self.jvp_step, self.eps = weighting, jvp_backend, jvp_step, eps

    def instead_of_forward_derivatives(self) -> str | None:
        taken = self.jvp_backend == "forward_ad" and self.equal_share < 1
        return "module.jvp_backend=finite_difference" if taken else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._step(batch, self.step_generator(batch_idx), "train")
        self.log("monitor/gate_mean", self.student.soft_prompt.gate.mean())
        return self.refuse_nan(loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, self.step_generator(batch_idx, stream=1), "val")

    def _step(self, batch: dict[str, Tensor], generator: Generator, split: str) -> Tensor:
        x0, attention_mask = batch["input_ids"], batch["attention_mask"]
        # 1. an interval for each row and the text corrupted at its noisy end
        r, t, n_equal = sample_interval(
            len(x0),
            generator,
            x0.device,
            law=self.time_law,
            equal_share=self.equal_share,
            endpoint_share=self.endpoint_share,
        )
        p = mask_probability(t, self.eps)
        xt, masked = mask_tokens(x0, batch["response_mask"], p, self.teacher.mask_id, generator)
        row = row_of_masked(masked)  # (M,)
        # 2. instantaneous logits v of the teacher at the masked positions
        embeds = self.teacher.embed(xt).detach()  # (B, L, D)
        with torch.no_grad():
            v = self.teacher.lm_head(self.teacher.hidden(embeds, attention_mask)[masked])  # (M, V)
        # 3. average logits u of the student and du/dt along the masking path (zero weight where r = t)
        u, du_dt = self._student_logits_and_derivative(embeds, v, masked, attention_mask, r, t, p, n_equal)
        # 4. the identity's right-hand side, held constant
        target = meanflow_target(v, du_dt, r[row], t[row], self.correction_limit)
        # 5. the distance, raw and weighted
        tokens = x0[masked]
        raw = flow_loss(u, target, self.loss, tokens if self.hard_target == "data" else None)
        if self.data_weight:
            raw = raw + self.data_weight * flow_loss(u, target, "hard", tokens)
        weight = self._weights(raw, p[row])
        loss = _mean(raw * weight)
        self._log_step(split, raw, loss, u, du_dt, (t - r)[row], tokens, len(x0))
        return loss

    def _student_logits_and_derivative(
        self,
        embeds: Tensor,
        v: Tensor,
        masked: Tensor,
        attention_mask: Tensor,
        r: Tensor,
        t: Tensor,
        p: Tensor,
        n_equal: int,
    ) -> tuple[Tensor, Tensor]:
        """u and du/dt at the masked positions, (M, V) each; rows with r = t (the first n_equal) skip the derivative.

        A kind without rows is computed for one that does not count, so that every rank takes the same forwards.
        """

        def logits(z: Tensor, end: Tensor, rows: slice) -> Tensor:
            hidden = self.student.hidden(z, attention_mask[rows], r[rows], end)
            return self.teacher.lm_head(hidden[masked[rows]])

        first, parts, derivatives = int(masked[:n_equal].sum()), [], []
        if self.equal_share:
            equal = slice(0, max(1, n_equal))
            parts.append(logits(embeds[equal], t[equal], equal)[:first])
            derivatives.append(torch.zeros_like(parts[0]))
        if self.equal_share < 1:
            wide = slice(min(n_equal, len(t) - 1), len(t))
            expected = expected_embedding(v[int(masked[: wide.start].sum()) :], self.teacher.embedding)
            p_wide = p[wide].unsqueeze(-1).expand(masked[wide].shape)[masked[wide]]
            drift = masking_path_tangent(embeds[wide][masked[wide]], expected, p_wide, self.eps, self.tangent)
            direction = torch.zeros_like(embeds[wide]).masked_scatter(masked[wide].unsqueeze(-1), drift)
            u, du_dt = value_and_jvp(
                lambda z, end: logits(z, end, wide),
                (embeds[wide], t[wide]),
                (direction, torch.ones_like(t[wide])),
                backend=self.jvp_backend,
                step=self.jvp_step,
            )
            counting = len(v) - first
            parts.append(u[:counting])
            derivatives.append(du_dt[:counting])
        return torch.cat(parts), torch.cat(derivatives)

    def _weights(self, raw: Tensor, p: Tensor) -> Tensor:
        if self.weighting == "adaptive":
            return adaptive_weight(raw)
        return 1.0 / p if self.weighting == "inverse_p" else torch.ones_like(raw)

    def _log_step(
        self, split: str, raw: Tensor, loss: Tensor, u: Tensor, du_dt: Tensor, gap: Tensor, tokens: Tensor, rows: int
    ) -> None:
        sync = split == "val"
        self.log(f"{split}/loss", loss, prog_bar=True, batch_size=rows, sync_dist=sync)
        self.log(f"{split}/raw_loss", _mean(raw), batch_size=rows, sync_dist=sync)
        accuracy = _mean((u.detach().argmax(-1) == tokens).float())
        self.log(f"{split}/masked_accuracy", accuracy, prog_bar=True, batch_size=rows)
        self.log(f"monitor/{split}_correction", _mean((gap.unsqueeze(-1) * du_dt).abs()), batch_size=rows)

    def decoders(self) -> list[Decoder]:
        students = [OneStepDecoder(self.student, temperature=temperature) for temperature in (1.0, 0.0)]
        return [*self.teacher_decoders(), *students]


def _mean(values: Tensor) -> Tensor:
    """Mean over masked positions; 0 for a batch in which none happened to be masked."""
    return values.sum() / max(1, values.numel())
