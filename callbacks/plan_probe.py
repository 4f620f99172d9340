"""A linear probe of a model's hidden states for the plans of texts, and the same probe on shuffled labels."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Generator, Tensor

from models.functional.probe import fit_ridge, probe_accuracy, standardise
from models.functional.rows import response_columns


class PlanProbe(Callback):
    """Adds figures where the corpus knows its plans (`hidden_plans`) and the module has `states`.

    probe: accuracy on test texts, averaged over attributes, from the hidden state at a text's last position.
    probe_mean: from the mean of the hidden states, for which states of single words are enough.
    probe_untrained: `probe` before the training. Random states mix all words of a text and lose none, so that a training
        that keeps only what its task needs can come out below.
    probe_shuffled: `probe` with labels shuffled before fitting. probe_chance: the most frequent value everywhere.
    Only texts whose prompt reveals nothing are used. rows: number of training texts that the probe is fitted on.
    """

    def __init__(self, rows: int = 200, ridge: float = 1e-3) -> None:
        self.rows, self.ridge = rows, ridge
        self.untrained: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and self.untrained is None:
            with getattr(pl_module, "whole_weights", nullcontext)():
                self.untrained = self._figures(trainer, pl_module).get("probe")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = self._figures(trainer, pl_module)
        if figures and self.untrained is not None:
            figures["probe_untrained"] = self.untrained
        if figures:
            pl_module.figures.add(figures)

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self.untrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained = state["untrained"]

    @torch.no_grad()
    def _figures(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        plans_of = getattr(trainer.datamodule, "hidden_plans", None)
        if plans_of is None or not hasattr(module, "states"):
            return {}
        train, test = (_unprompted(trainer.datamodule.rows[split].columns) for split in ("train", "test"))
        splits = [{name: column[: self.rows] for name, column in train.items()}, test]
        if min(len(rows["input_ids"]) for rows in splits) < 2:
            return {}
        plans = [plans_of(rows) for rows in splits]
        last, mean = zip(*(self._states(module, rows) for rows in splits), strict=True)
        shuffled = plans[0][torch.randperm(len(plans[0]), generator=Generator().manual_seed(0))]
        common = plans[0].mode(0).values
        return {
            "probe": self._accuracy(last, plans),
            "probe_mean": self._accuracy(mean, plans),
            "probe_shuffled": self._accuracy(last, [shuffled, plans[1]]),
            "probe_chance": (plans[1] == common).double().mean().item(),
        }

    def _states(self, module: LightningModule, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The hidden state at the last position, and the mean over the response, (N, D) each."""
        last, mean = [], []
        for start in range(0, len(rows["input_ids"]), 512):
            few = {name: column[start : start + 512].to(module.device) for name, column in rows.items()}
            states = module.states(few)[:, -response_columns(few["response_mask"]) :]
            last.append(states[:, -1].cpu())
            mean.append(states.mean(1).cpu())
        return torch.cat(last), torch.cat(mean)

    def _accuracy(self, states: tuple[Tensor, Tensor], plans: list[Tensor]) -> float:
        train, test = standardise(*(part.double() for part in states))
        found = []
        for a in range(plans[0].shape[-1]):
            labels, truth = plans[0][:, a], plans[1][:, a]
            weights = fit_ridge(train, labels, int(max(labels.max(), truth.max())) + 1, self.ridge)
            found.append(probe_accuracy(weights, test, truth))
        return sum(found) / len(found)


def _unprompted(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows whose prompt reveals nothing of the plan."""
    chosen = (columns["reveal"] < 0).all(-1)
    return {name: column[chosen] for name, column in columns.items()}
