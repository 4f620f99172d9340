"""Counts the floating point operations of a training step, and stops a training when a budget of them is spent."""

from lightning import Callback, LightningModule, Trainer

from models.functional.errors import UsageError


class FlopBudget(Callback):
    """Notes `flops_per_step` in the module's figures; with a budget it sets the trainer's steps before anything else does.

    flops: budget of the whole training, over all ranks; None leaves trainer.max_steps as it is. Counted is one forward and
    backward pass of the objective, products and convolutions; equal budgets make objectives of different cost comparable.
    """

    def __init__(self, flops: float | None = None) -> None:
        if flops is not None and flops <= 0:
            raise UsageError(f"callbacks.budget.flops={flops} must be above 0; null trains trainer.max_steps steps")
        self.flops = flops

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        batch = next(iter(trainer.datamodule.train_dataloader()))
        per_step = pl_module.flops_of_step(batch) * trainer.world_size * trainer.accumulate_grad_batches
        pl_module.figures.add({"flops_per_step": per_step})
        if self.flops is not None and not trainer.fast_dev_run:
            steps = int(self.flops // per_step)
            if steps < 1:
                raise UsageError(
                    f"callbacks.budget.flops={self.flops:g} is less than one step, which takes {per_step:.3g}; "
                    f"type for example callbacks.budget.flops={1000 * per_step:.2g}"
                )
            trainer.fit_loop.epoch_loop.max_steps = steps

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        per_step = pl_module.figures.values["flops_per_step"]
        pl_module.figures.add({"train_flops": per_step * trainer.global_step})
