"""A module whose every figure can be worked out by hand, offering all that monitors look at."""

from types import SimpleNamespace

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from models.interfaces.figures import ModelFigures
from models.interfaces.probe_batch import Choices, EStep, ProbeBatch

ROWS, TOKENS = 6, 4


class SixRows(LightningDataModule):
    """Rows 0 to 5: one prompt column, four response columns, whose first token is the row's number."""

    def __init__(self) -> None:
        super().__init__()
        ids = torch.arange(ROWS).unsqueeze(-1).repeat(1, 1 + TOKENS)
        columns = {"input_ids": ids, "response_mask": torch.ones_like(ids).bool()}
        self.rows = {split: SimpleNamespace(columns=columns) for split in ("train", "val", "test")}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(64.0).unsqueeze(-1), batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(4.0).unsqueeze(-1), batch_size=4)


class Watched(LightningModule):
    """A text costs 1 nat a token under its own condition and 1 + used * |difference| under another, at positions below `reach`.

    A row's last token does not count where its number is odd.
    """

    def __init__(self, used: float = 1.0, reach: int = TOKENS) -> None:
        super().__init__()
        self.used, self.reach = used, reach
        self.plan_head, self.other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        self.relaxation: tuple[Tensor, Tensor] | None = None
        self.e_step: EStep | None = None
        self.figures = ModelFigures()

    @property
    def probes(self) -> tuple[LightningModule]:
        return (self,)

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        angle = batch.flatten() / 10
        self.relaxation = torch.stack([angle.cos(), angle.sin()], -1), torch.tensor([[1.0, 0.0]]).repeat(len(batch), 1)
        self.e_step = self.search(batch) if batch_idx % 2 == 0 else None
        return self.plan_head(batch).mean() + self.other(batch).mean()

    @staticmethod
    def search(batch: Tensor) -> EStep:
        """Margins are the rows' numbers / 10, none for 11.

        Multiples of three had a plan before, multiples of six one that scored 0.5 nats less.
        """
        number = batch.flatten()
        flips = (number % 6 == 0).float().masked_fill(number % 3 != 0, torch.nan)
        return EStep((number / 10).masked_fill(number == 11, torch.inf), flips / 2, flips)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    # -- what monitors look at -----------------------------------------------------------------------------------------

    def probe_batch(self, rows: dict[str, Tensor], generator) -> ProbeBatch:
        number = rows["input_ids"][:, 0]
        counts = torch.ones(len(number), TOKENS, dtype=torch.bool)
        counts[:, -1] = number % 2 == 0
        return ProbeBatch(rows["input_ids"][:, 1:], counts, {"number": number.float()})

    def nll(self, rows: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        wrong = self.used * (batch.condition["number"] - batch.text[:, 0]).abs()
        return 1 + wrong.unsqueeze(-1) * (torch.arange(TOKENS) < self.reach)

    def corrupt_condition(self, batch: ProbeBatch, how: str, generator) -> dict[str, Tensor] | None:
        return {"number": batch.text[:, 0] + 10.0} if how == "blank" else None

    def condition_features(self, batch: ProbeBatch) -> Tensor:
        return batch.condition["number"].unsqueeze(-1)

    def choices(self, rows: dict[str, Tensor], generator) -> dict[str, Choices]:
        """Even rows are sure of choice 0, odd ones hesitate between it and choice 1; choice 2 is never possible."""
        odd = (rows["input_ids"][:, 0] % 2 == 1).double()
        p = torch.stack([1 - odd / 2, odd / 2 + 1e-30, torch.zeros_like(odd)], -1)
        log_p = p.log().nan_to_num(neginf=-1e9).unsqueeze(1)
        return {"planner": Choices(log_p, torch.ones(len(odd), 1, dtype=torch.bool))}

    def take_planner_gradient(self) -> Tensor:
        return self.plan_head.weight.grad.abs().sum()
