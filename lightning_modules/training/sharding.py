"""trainer=fsdp: weights and optimiser state split over ranks (FSDP2), in checkpoints of one rank's shape.

What is split is a module's choice (`LeapModule.configure_model`). While something is compared or written every rank has the
whole model: ranks may then answer different numbers of prompts, and rank 0 may write files alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_modules.training.torch_2_11 import reduce_unused_weights
from models.backbones.sharded_layers import gather_frozen, scatter_frozen
from models.functional.errors import UsageError
from models.functional.weights import distributed_like, full_tensor, tensor_to_save, trainable_weights


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with all ranks in one data-parallel group.

    Checkpoints are those of one rank: whole tensors, of what trains alone, and the optimiser's own numbering. Gradients of
    trained weights that are not split are averaged over ranks after each backward pass.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def require_several(self) -> None:
        """Errors: UsageError where there is one process only."""
        if self.num_nodes * self.num_processes < 2:
            raise UsageError(
                "trainer=fsdp splits weights over processes, and there is one only; type trainer.devices=2 (or as many as "
                "there are), or trainer=default"
            )

    # -- setting up ---------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        self.require_several()
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        if not any(isinstance(callback, UnshardForEvaluation) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, UnshardForEvaluation())
        super().setup(trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        average_gradients(self.lightning_module)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        return {name: tensor_to_save(value) for name, value in module.state_dict().items() if name not in frozen}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map_only(Tensor, tensor_to_save, Strategy.optimizer_state(self, optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        given = {
            name: distributed_like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(given, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        state[name] = distributed_like(value, p)


class UnshardForEvaluation(Callback):
    """Makes the model whole for validation and at the end of training. It is the first of the callbacks.

    It gathers after all others have set the weights that they validate, splits again before they restore theirs, and leaves
    the model whole before any of them writes it.
    """

    def __init__(self) -> None:
        self.gathered = ExitStack()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gathered.enter_context(whole_weights(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gathered.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        make_whole(pl_module)


def shard_trained(module: LightningModule, mesh: DeviceMesh, blocks: list[nn.Module]) -> None:
    """Split what trains: each block is whole while it is computed, everything else while a training step is.

    Blocks are modules that are called as such, equally often on every rank.
    """
    frozen = {p for p in module.parameters() if not p.requires_grad}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=frozen)
    # whole from the forward to the backward pass; a step has one of each
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    for part in fsdp_modules(module):
        reduce_unused_weights(part)
    register_fsdp_forward_method(module, "training_step")


@contextmanager
def whole_weights(module: LightningModule) -> Iterator[None]:
    """Within this context every rank has all of the weights, to read. Every rank has to enter it."""
    shares, parts = gather_frozen(module), fsdp_modules(module)
    if parts:
        # the root is the module, not the layer that happens to be called first
        fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]  # a decorator adds it
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)
        scatter_frozen(shares)


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@torch.no_grad()
def make_whole(module: LightningModule) -> None:
    """Give every rank all of the weights, for good; the module is then as if it had never been split."""
    found: dict[nn.Parameter, nn.Parameter] = {}  # weights may be shared
    for part in module.modules():
        for name, p in part._parameters.items():
            if isinstance(p, DTensor):
                if p not in found:
                    found[p] = nn.Parameter(full_tensor(p), requires_grad=p.requires_grad)
                part._parameters[name] = found[p]
    for part in fsdp_modules(module):
        state = fully_shard.state(part)  # type: ignore[attr-defined]  # a decorator adds it
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        part.__class__ = type(part).__mro__[FSDPModule._orig_cls_mro_index]
    module.__dict__.pop("training_step", None)


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """The mean over ranks of the gradients of what trains whole; a rank without one counts as zero."""
    trained = [p for p in trainable_weights(module).values() if not isinstance(p, DTensor)]
    if not trained:
        return
    held = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for p, wanted in zip(trained, held.tolist(), strict=True):
        if wanted:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            by_type.setdefault(p.dtype, []).append(p.grad)
    for gradients in by_type.values():
        together = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for g, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view_as(g))
