"""A trainer for tests: CPU, no files unless asked for, no bars; and what it came to."""

from lightning import Callback, Trainer


def quiet_trainer(max_steps: int, **options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        max_steps=max_steps,
        max_epochs=options.pop("max_epochs", -1),
        logger=options.pop("logger", False),
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=options.pop("val_check_interval", 1000),
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        **options,
    )


class Losses(Callback):
    """seen: the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.seen.append(outputs["loss"].item())
