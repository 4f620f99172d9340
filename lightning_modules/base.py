"""What every Leap method does alike: optimiser, seeded draws, small checkpoints and the comparison of decoders."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, get_args

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from lightning_modules.training.decoder_cost import measure_decoder
from lightning_modules.training.optimizers import OptimizerName, make_optimizer, used_optimizer
from lightning_modules.training.sharding import shard_trained, whole_weights
from models.backbones.sharded_layers import shard_frozen
from models.functional.errors import UsageError, require_at_least, require_choice
from models.functional.weights import trainable_weights
from models.interfaces.decoder import Decoder
from models.interfaces.figures import ModelFigures


class LeapModule(LightningModule):
    """One optimiser of the trainable parameters with linear warm-up and cosine decay over the trainer's steps.

    probes: parts that monitors read (models/interfaces/probes.py).
    figures: what callbacks add to the row of the model itself in the final table; None for a module without such a row.

    optimizer: adamw | muon, see `make_optimizer`.
    Checkpoints hold trainable parameters only: frozen bases come from their own files.
    seed: every random draw of a step is a function of (seed, epoch, batch, rank), so a resumed run repeats the original's.
    """

    probes: tuple[Any, ...] = ()
    figures: ModelFigures | None = None

    def __init__(
        self, *, lr: float, weight_decay: float, warmup_steps: int, seed: int, optimizer: OptimizerName = "adamw"
    ) -> None:
        super().__init__()
        require_choice("module.optimizer", optimizer, get_args(OptimizerName))
        require_at_least(
            0, module__lr=lr, module__weight_decay=weight_decay, module__warmup_steps=warmup_steps, seed=seed
        )
        self.lr, self.weight_decay, self.warmup_steps, self.seed = lr, weight_decay, warmup_steps, seed
        self.optimizer_name = optimizer
        self.strict_loading = False

    # -- weights split over ranks (trainer=fsdp) ----------------------------------------------------------------------

    # why ranks may take different forwards in a step, and what to type; frozen layers then cannot be gathered as they are used
    rank_dependent_reason: str | None = None

    def configure_model(self) -> None:
        if self.device_mesh is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.require_splittable()
        ranks = self.device_mesh["data_parallel"]
        if self.rank_dependent_reason is None:
            shard_frozen(self, ranks, self.trainer.strategy.root_device)
        if not self.trains_additions():
            shard_trained(self, ranks, self.blocks())

    def require_splittable(self) -> None:
        """Errors: UsageError where neither what is frozen nor what trains could be split."""
        if self.rank_dependent_reason is not None and self.trains_additions():
            raise UsageError(f"trainer=fsdp would split nothing: {self.rank_dependent_reason}, or trainer=ddp")

    def trains_additions(self) -> bool:
        """Whether what trains is an addition to frozen weights, small enough to be whole on every rank."""
        return any(isinstance(part, BaseTunerLayer) for part in self.modules())

    def blocks(self) -> list[nn.Module]:
        """Trained modules of which one at a time is whole; called as such, and equally often on every rank."""
        return []

    def whole_weights(self) -> AbstractContextManager[None]:
        """A context in which every rank may take the forwards that it wants; every rank has to ask."""
        return whole_weights(self)

    def instead_of_forward_derivatives(self) -> str | None:
        """What to type where a training step must not differentiate the layers in forward mode; None: it does not."""
        return None

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.require_precision(str(self.trainer.precision))

    def require_precision(self, precision: str) -> None:
        """Errors: UsageError where the module cannot train in this trainer.precision."""

    # -- training ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        weights = trainable_weights(self)
        optimizer = make_optimizer(self.optimizer_name, weights, lr=self.lr, weight_decay=self.weight_decay)
        schedule = self.lr_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """Linear warm-up and cosine decay over `steps`."""
        return get_cosine_schedule_with_warmup(optimizer, min(self.warmup_steps, steps // 2), steps)

    def step_generator(self, batch_idx: int, stream: int = 0, epoch: int | None = None) -> Generator:
        """The source of every random draw of one step; of the current epoch where none is given."""
        epoch = self.current_epoch if epoch is None else epoch
        entropy = np.random.SeedSequence([self.seed, stream, epoch, batch_idx, self.global_rank])
        return Generator(device=self.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def generator_of_all_ranks(self) -> Generator:
        """The source of this step's draws that every rank has to make alike."""
        return Generator(device=self.device).manual_seed(self.seed * 1_000_003 + self.global_step)

    def gathered(self, own: Tensor) -> Tensor:
        """A tensor of all ranks, (ranks, ...)."""
        return self.all_gather(own).reshape(-1, *own.shape)

    def in_row_order(self, own: Tensor) -> Tensor:
        """(B, ...) of all ranks -> (ranks * B, ...), in the order of the rows, whatever the number of ranks."""
        return self.gathered(own).transpose(0, 1).flatten(0, 1)

    def progress(self) -> float:
        """Share of the steps that are over."""
        return self.global_step / max(1.0, float(self.trainer.estimated_stepping_batches))

    def annealed(self, ends: tuple[float, float], share: float) -> float:
        """From the first to the second value over the first `share` of the steps."""
        over = max(1.0, share * float(self.trainer.estimated_stepping_batches))
        return ends[0] + (ends[1] - ends[0]) * min(1.0, self.global_step / over)

    def refuse_nan(self, loss: Tensor) -> Tensor:
        """The loss, or an error before it can reach the weights: the last checkpoint stays good."""
        if not torch.isfinite(loss):
            raise UsageError(
                f"the loss is {loss.item()} at step {self.global_step}: training diverged; go on from the last checkpoint "
                f"(ckpt_path=last) or start again with a learning rate below {self.lr:g}"
            )
        return loss

    def log_monitors(self, figures: Mapping[str, Tensor | float]) -> None:
        """Log `monitor/<name>` of a training step, in the steps that the logger writes down.

        Lightning takes a quarter of a millisecond for each figure: many of them in every step would slow small models.
        """
        every = self.trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:
            self.log_dict({f"monitor/{name}": value for name, value in figures.items()})

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def trainable_names(self) -> set[str]:
        return set(trainable_weights(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = self.trainable_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["optimizer_name"] = used_optimizer(self.optimizer_name, trainable_weights(self))
        for name, weight in checkpoint["state_dict"].items():
            if not torch.isfinite(weight).all():
                raise UsageError(
                    f"{name} is not finite after step {self.global_step}: training diverged, and the checkpoint before it is "
                    f"kept; go on from there (ckpt_path=last) or start again with a learning rate below {self.lr:g}"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get("optimizer_name", "adamw")
        own = used_optimizer(self.optimizer_name, trainable_weights(self))
        if kept != own and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            raise UsageError(
                f"the checkpoint was trained with module.optimizer={kept}, whose state means nothing to {own}; "
                f"type module.optimizer={kept} to go on"
            )
        held, wanted = checkpoint["state_dict"], dict(self.named_parameters())
        for name in sorted(self.trainable_names()):
            if name not in held:
                raise UsageError(f"the checkpoint has no {name}: it was written by another module or architecture")
            if held[name].shape != wanted[name].shape:
                raise UsageError(
                    f"the checkpoint's {name} has shape {tuple(held[name].shape)}, this model's {tuple(wanted[name].shape)}; "
                    "use the model and module options it was trained with (its run folder holds them in .hydra/config.yaml)"
                )

    # -- comparison of decoders -------------------------------------------------------------------------------------

    def decoders(self) -> list[Decoder]:
        """The ways of generating that `trainer.test` compares."""
        raise NotImplementedError

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        """What the module knows of its k-th decoder beside the texts, as the record's `quality` and `cost`; every rank asks."""
        return {"quality": {}, "cost": {}}

    def model_figures(self) -> dict[str, float]:
        """Figures of the model itself after a test; every rank asks."""
        return {}

    def model_cost(self) -> dict[str, float | None]:
        """What the model itself costs, as the record's `cost` of its row; every rank asks."""
        return {}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's responses to the batch, and what each cost."""
        results = []
        for k, decoder in enumerate([*self.decoders(), *self.trainer.datamodule.controls()]):
            generator = self.step_generator(batch_idx, stream=100 + k, epoch=0)  # alike whenever the comparison is made
            results.append(measure_decoder(decoder, batch, generator, count_flops=batch_idx == 0))
        return {"results": results}


def require_forwards(option: str, given: list[int], most: int) -> None:
    """Raise UsageError, naming the option, unless all numbers of forwards lie between 1 and the response length."""
    if min(given) < 1 or max(given) > most:
        raise UsageError(
            f"{option}={given} must lie between 1 and the response length {most}; "
            f"type for example {option}=[1,2,{min(4, most)}]"
        )
