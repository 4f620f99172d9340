"""`LeapModule`, what every method's LightningModule shares: optimizer, seeded draws, small checkpoints, the comparison.

A method adds `training_step`, `validation_step` and `decoders`. Everything else has a default.
"""

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

from lightning_modules.training.checkpoints import kept_state, require_optimizer, require_weights
from lightning_modules.training.decoder_cost import measure_decoder
from lightning_modules.training.optimizers import make_optimizer, used_optimizer
from lightning_modules.training.sharding import shard_trained, whole_weights
from models.backbones.sharded_layers import shard_frozen
from models.functional.errors import UsageError, require_at_least, require_choice
from models.functional.weights import trainable_weights
from models.interfaces.decoder import Decoder
from models.interfaces.figures import ModelFigures
from models.interfaces.optimizer import OptimizerName

COMPARISON_STREAM = 100  # of random draws; a decoder's own is this plus its index


class LeapModule(LightningModule):
    """One optimizer of the trainable parameters with linear warm-up and cosine decay over the trainer's steps.

    lr, weight_decay, warmup_steps: of the optimizer. optimizer: adamw | muon, see `make_optimizer`.
    seed: every random draw of a step is a function of (seed, epoch, batch, rank), so a resumed run repeats the original's.

    probes: parts that monitors read (models/interfaces/probes.py).
    figures: what callbacks add to the row of the model itself in the final table; None for a module without such a row.
    rank_dependent_reason: where ranks may take different forward passes in a step, why, and what to type instead. Frozen
        layers are then left whole, because ranks gather a split layer together.

    Checkpoints hold trainable parameters only: frozen bases come from their own files.
    """

    probes: tuple[Any, ...] = ()
    figures: ModelFigures | None = None
    rank_dependent_reason: str | None = None

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

    # -- before training: precision, forward-mode derivatives ---------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.require_precision(str(self.trainer.precision))

    def require_precision(self, precision: str) -> None:
        """Errors: UsageError where the module cannot train in this trainer.precision."""

    def instead_of_forward_derivatives(self) -> str | None:
        """What to type so that a training step has no forward-mode derivatives of the layers; None: it has none."""
        return None

    # -- before training: weights split over ranks (trainer=fsdp) -----------------------------------------------------

    def configure_model(self) -> None:
        if self.device_mesh is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.require_splittable()
        ranks = self.device_mesh["data_parallel"]
        # 1. frozen layers: gathered for each product, which every rank has to take
        if self.rank_dependent_reason is None:
            shard_frozen(self, ranks, self.trainer.strategy.root_device)
        # 2. what trains
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
        """Trained modules of which one at a time is whole. They are called as modules, equally often on every rank."""
        return []

    def whole_weights(self) -> AbstractContextManager[None]:
        """A context in which ranks may take different forward passes; every rank has to enter it."""
        return whole_weights(self)

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        weights = trainable_weights(self)
        optimizer = make_optimizer(self.optimizer_name, weights, lr=self.lr, weight_decay=self.weight_decay)
        schedule = self.lr_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """Linear warm-up and cosine decay over `steps`."""
        return get_cosine_schedule_with_warmup(optimizer, min(self.warmup_steps, steps // 2), steps)

    # -- accumulation -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Errors: UsageError where an epoch ends within an optimiser step.

        Lightning steps there all the same, and divides by the full count.
        """
        batches, each = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches != float("inf") and batches % each:
            raise UsageError(
                f"trainer.accumulate_grad_batches={each} does not divide an epoch of {batches} batches; type a number that "
                "does, or leave out trainer.limit_train_batches"
            )

    def ends_optimizer_step(self, batch_idx: int) -> bool:
        """Whether a batch is the last micro-batch of its optimiser step."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    # -- a training step: random draws --------------------------------------------------------------------------------

    def step_generator(self, batch_idx: int, stream: int = 0, epoch: int | None = None) -> Generator:
        """The source of every random draw of one step.

        stream: draws of different streams are independent. epoch: None is the current one.
        """
        epoch = self.current_epoch if epoch is None else epoch
        entropy = np.random.SeedSequence([self.seed, stream, epoch, batch_idx, self.global_rank])
        return Generator(device=self.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def generator_of_all_ranks(self) -> Generator:
        """The source of this step's draws that are the same on every rank."""
        return Generator(device=self.device).manual_seed(self.seed * 1_000_003 + self.global_step)

    # -- a training step: tensors of all ranks ------------------------------------------------------------------------

    def gathered(self, own: Tensor) -> Tensor:
        """A tensor of all ranks, (ranks, ...)."""
        return self.all_gather(own).reshape(-1, *own.shape)

    def in_row_order(self, own: Tensor) -> Tensor:
        """(B, ...) of each rank -> (ranks * B, ...), in the order of the data's rows, whatever the number of ranks."""
        return self.gathered(own).transpose(0, 1).flatten(0, 1)

    # -- a training step: schedules, the loss, monitors ---------------------------------------------------------------

    def progress(self) -> float:
        """Share of the training steps that are done, 0 to 1."""
        return self.global_step / max(1.0, float(self.trainer.estimated_stepping_batches))

    def annealed(self, ends: tuple[float, float], share: float) -> float:
        """From the first to the second value, linearly over the first `share` of the steps."""
        return ends[0] + (ends[1] - ends[0]) * min(1.0, self.global_step / self.annealing_steps(share))

    def annealing_steps(self, share: float) -> float:
        """How many steps that share of all has, at least one."""
        return max(1.0, share * float(self.trainer.estimated_stepping_batches))

    def refuse_nan(self, loss: Tensor) -> Tensor:
        """The loss. Errors: UsageError if it is not finite, before it reaches the weights: the last checkpoint stays good."""
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

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def trainable_names(self) -> set[str]:
        """Names of the parameters that a checkpoint has to hold."""
        return set(trainable_weights(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state, names = checkpoint["state_dict"], self.trainable_names()
        checkpoint["state_dict"] = kept_state(state, names, step=self.global_step, lr=self.lr)
        checkpoint["optimizer_name"] = used_optimizer(self.optimizer_name, trainable_weights(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            own = used_optimizer(self.optimizer_name, trainable_weights(self))
            require_optimizer(checkpoint.get("optimizer_name", "adamw"), own)
        require_weights(checkpoint["state_dict"], self, self.trainable_names())

    # -- the comparison of decoders (trainer.test) --------------------------------------------------------------------

    def decoders(self) -> list[Decoder]:
        """The ways of generating that are compared."""
        raise NotImplementedError

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's responses to the batch, and what each cost; a run with `fast_dev_run` only looks for faults."""
        in_detail = batch_idx == 0 and not self.trainer.fast_dev_run
        results = []
        for k, decoder in enumerate([*self.decoders(), *self.trainer.datamodule.controls()]):
            # the same draws whenever the comparison is made
            generator = self.step_generator(batch_idx, stream=COMPARISON_STREAM + k, epoch=0)
            results.append(measure_decoder(decoder, batch, generator, in_detail=in_detail))
        return {"results": results}

    # what follows is asked for after a test, on every rank

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        """Figures of the k-th decoder that its texts do not show, as the record's `quality` and `cost`."""
        return {"quality": {}, "cost": {}}

    def model_figures(self) -> dict[str, float]:
        """Figures of the model itself."""
        return {}

    def record_parts(self) -> dict[str, Any]:
        """Further parts of the record, such as a curve, by name."""
        return {}

    def model_cost(self) -> dict[str, float | None]:
        """What the model itself costs, as the record's `cost` of its row."""
        return {}
