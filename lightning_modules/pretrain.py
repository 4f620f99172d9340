"""PretrainModule: one model, one injected objective. Teachers are trained with it."""

from typing import Any

from torch import Tensor, nn

from lightning_modules.base import LeapModule
from models.decoding.decoder import Decoder
from models.decoding.masked_diffusion import MaskedDiffusionDecoder, Remasking
from models.objectives.base import Objective


class PretrainModule(LeapModule):
    """model: the network; objective: batch -> summed loss and token count.

    forwards, temperature, remasking: the sampler settings that `trainer.test` compares.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        forwards: tuple[int, ...] = (1, 2, 4, 8, 16),
        temperature: float = 1.0,
        remasking: Remasking = "random",
        seed: int = 0,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
        self.save_hyperparameters(ignore=["model", "objective"])
        self.model, self.objective = model, objective
        self.forwards, self.temperature, self.remasking = tuple(forwards), temperature, remasking

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.refuse_nan(self._loss(batch, batch_idx, "train"))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch, batch_idx, "val")

    def _loss(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> Tensor:
        stream = 0 if split == "train" else 1
        out = self.objective(self.model, batch, self.step_generator(batch_idx, stream))
        loss = out.loss_sum / max(1, out.tokens)
        self.log(f"{split}/loss", loss, prog_bar=True, batch_size=max(1, out.tokens), sync_dist=split == "val")
        return loss

    def decoders(self) -> list[Decoder]:
        options: dict[str, Any] = {"temperature": self.temperature, "remasking": self.remasking}
        return [MaskedDiffusionDecoder(self.model, n, **options) for n in self.forwards]
