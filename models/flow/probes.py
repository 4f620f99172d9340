"""What a noisy-mask flow shows to monitors (the protocols of models/interfaces/probes.py): is its noise used?

Legend: B batch, L length, R response columns, D width, V vocabulary.
"""

import torch
from torch import Generator, Tensor

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.functional.bits_per_byte import token_nll
from models.functional.rows import response_columns
from models.interfaces.probe_batch import Choices, ProbeBatch


class NoiseProbe:
    """A condition is the noise (B, R, D) of a response; texts are the student's own answers to it."""

    def __init__(self, student: NoisyMaskStudent) -> None:
        self.student = student

    def probe_batch(self, rows: dict[str, Tensor], generator: Generator) -> ProbeBatch:
        """One forward's most probable text of fresh noise."""
        noise = self._response(rows, self.student.start(rows, rows["response_mask"], generator))
        text = self._logits(rows, noise).argmax(-1)
        return ProbeBatch(text, torch.ones_like(text, dtype=torch.bool), {"noise": noise})

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        return token_nll(self._logits(rows, batch.condition["noise"]), batch.text)

    def corrupt_condition(self, batch: ProbeBatch, how: str, generator: Generator) -> dict[str, Tensor]:
        """Masks without noise, or fresh noise."""
        noise = batch.condition["noise"]
        if how == "blank":
            return {"noise": self.student.mask_embedding.expand_as(noise)}
        masked = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
        return {"noise": self.student.start({"input_ids": batch.text}, masked, generator)}

    def condition_features(self, batch: ProbeBatch) -> Tensor:
        return batch.condition["noise"].flatten(1)

    def choices(self, rows: dict[str, Tensor], generator: Generator) -> dict[str, Choices]:
        """Words in one forward of fresh noise."""
        noise = self._response(rows, self.student.start(rows, rows["response_mask"], generator))
        log_p = self._logits(rows, noise).log_softmax(-1)
        return {"student": Choices(log_p, torch.ones_like(log_p[..., 0], dtype=torch.bool))}

    def _response(self, rows: dict[str, Tensor], points: Tensor) -> Tensor:
        return points[:, -response_columns(rows["response_mask"]) :]

    def _logits(self, rows: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Logits (B, R, V) of the jump from noise to text."""
        masked = rows["response_mask"]
        z = self.student.base.embed(rows["input_ids"])
        z = torch.cat([z[:, : -noise.shape[1]], noise.to(z.dtype)], 1)
        zero = torch.zeros(len(z), device=z.device)
        return self.student(z, masked, rows["attention_mask"], zero, zero + 1).view(*noise.shape[:2], -1)
