"""A short training under all monitors: monitor_ranks_job.py RANKS FILE [CHECKPOINT] writes what was logged."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.monitors.exchange import ExchangeMonitor
from callbacks.monitors.flips import FlipMonitor
from callbacks.monitors.gradient import GradientMonitor
from callbacks.monitors.margin import MarginMonitor
from callbacks.monitors.positions import PositionMonitor
from callbacks.monitors.relaxation import RelaxationMonitor
from callbacks.monitors.sharpness import SharpnessMonitor
from callbacks.monitors.staleness import StalenessMonitor
from datamodules.oracle.datamodule import OracleDataModule
from helpers.causal import tiny_causal
from helpers.concept import DRAWN, TYPES
from helpers.trainer import quiet_trainer
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.interfaces.probe_batch import EStep


class Searching(ConceptPlannerExecutorModule):
    """Reports of every batch what a search could have found, a function of its rows: ranks have unequal numbers of them."""

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        value = ids.float().std(-1)
        none = ids.sum(-1) % 3 == 0
        flips = (ids[:, -1] % 2).float().masked_fill(none, torch.nan)
        loss = super().training_step(batch, batch_idx)
        self.probe.e_step = EStep(value, value.square().masked_fill(none, torch.nan), flips)
        return loss


def main(ranks: int, out: Path, resume: str | None = None) -> None:
    torch.set_num_threads(1)
    data = OracleDataModule(
        size="tiny", train_rows=64, val_rows=17, test_rows=8, batch_size=16 // ranks, eval_batch_size=5
    )
    data.setup()
    ids = data.special_ids()
    torch.manual_seed(0)
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    options = {"noise": (0.0, 0.0), "corruption": (0.0, 0.0), "warmup_steps": 1, "lr": 3e-3} | DRAWN
    module = Searching(model, types=TYPES, weights={"text": 1.0, "planner": 1.0}, **options)
    monitors = [
        ExchangeMonitor(width=3),
        PositionMonitor(width=3),
        SharpnessMonitor(),
        RelaxationMonitor(),
        GradientMonitor(),
    ]
    monitors += [MarginMonitor(), FlipMonitor(), StalenessMonitor()]
    keep = ModelCheckpoint(out.parent / str(ranks), filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(
        3, devices=ranks, strategy="ddp" if ranks > 1 else "auto", val_check_interval=3, enable_checkpointing=True,
        callbacks=[*monitors, keep],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        out.write_text(json.dumps({name: value for name, value in found.items() if name.startswith("monitor/")}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
