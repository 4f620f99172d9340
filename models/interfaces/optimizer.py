"""The optimisers that `module.optimizer` names; they are built by `lightning_modules.training.optimizers`."""

from typing import Literal

OptimizerName = Literal["adamw", "muon"]
