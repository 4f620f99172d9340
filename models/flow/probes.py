"""What a noisy-mask flow offers to monitors (the protocols of models/interfaces/probes.py).

Legend: B batch, L length, R response columns, M masked positions, D width, V vocabulary.
"""

import torch
from torch import Generator, Tensor

from models.flow.losses import consistency_gap
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.path import PathSample
from models.flow.solver import NoisyMaskDecoder
from models.functional.bits_per_byte import token_nll
from models.functional.rows import response_columns
from models.interfaces.probe_batch import Choices, ProbeBatch
from models.interfaces.probes import Denoised


class NoiseProbe:
    """A condition is the noise (B, R, D) of a response; texts are the student's own answers to it."""

    def __init__(self, student: NoisyMaskStudent) -> None:
        self.student = student

    def probe_batch(self, rows: dict[str, Tensor], generator: Generator) -> ProbeBatch:
        """The most probable text of fresh noise, in one forward pass."""
        noise = self._response(rows, self.student.path.start_sample(rows, generator).z)
        text = self._logits(rows, noise).argmax(-1)
        return ProbeBatch(text, torch.ones_like(text, dtype=torch.bool), {"noise": noise})

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        return token_nll(self._logits(rows, batch.condition["noise"]), batch.text)

    def corrupt_condition(self, batch: ProbeBatch, how: str, generator: Generator) -> dict[str, Tensor]:
        """Masks without noise, or fresh noise."""
        noise = batch.condition["noise"]
        if how == "blank":
            return {"noise": self.student.path.mask_embedding.expand_as(noise)}
        masked = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
        return {"noise": self.student.path.start(batch.text, masked, generator)}

    def condition_features(self, batch: ProbeBatch) -> Tensor:
        return batch.condition["noise"].flatten(1)

    def choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """Words of fresh noise, in one forward pass."""
        noise = self._response(rows, self.student.path.start_sample(rows, generator).z)
        log_p = self._logits(rows, noise).log_softmax(-1)
        return {"student": Choices(log_p, torch.ones_like(log_p[..., 0], dtype=torch.bool))}

    def _response(self, rows: dict[str, Tensor], points: Tensor) -> Tensor:
        return points[:, -response_columns(rows["response_mask"]) :]

    def _logits(self, rows: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Logits (B, R, V) of the jump from noise to text."""
        z = self.student.path.embed(rows["input_ids"])
        z = torch.cat([z[:, : -noise.shape[1]], noise.to(z.dtype)], 1)
        zero = torch.zeros(len(z), device=z.device)
        response = rows["response_mask"]
        sample = PathSample(z, response, rows["attention_mask"], zero, rows["input_ids"], response)
        return self.student(sample, zero + 1).view(*noise.shape[:2], -1)


class FlowProbe:
    """A `FlowMapProbe` of a noisy-mask student: its answers, its denoiser and the consistency of its jumps."""

    def __init__(self, student: NoisyMaskStudent) -> None:
        self.student = student

    def answer(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        return NoisyMaskDecoder(self.student, 1)(rows, generator)

    def denoised(self, rows: dict[str, Tensor], time: float, generator: Generator) -> Denoised:
        s = torch.full((len(rows["input_ids"]),), time, device=rows["input_ids"].device)
        sample = self.student.path.sample(rows, rows["response_mask"], s, generator)
        points = sample.z[:, -response_columns(rows["response_mask"]) :]
        return Denoised(points, self.student(sample, s), sample.x0[sample.masked])

    def evidence(self, points: Tensor, time: float) -> Tensor:
        s = torch.full((len(points), 1), time, device=points.device)
        return self.student.path.evidence(points, s)

    def consistency_gap(self, rows: dict[str, Tensor], generator: Generator) -> Tensor:
        return consistency_gap(self.student, rows, generator)
