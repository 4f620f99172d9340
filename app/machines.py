"""Training on several machines (`trainer.num_nodes`): prints the address to join, and refuses a run that none can join."""

import os
import sys

from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment

from app.ranks import leads
from models.functional.errors import UsageError


def settle_machines(trainer: Trainer) -> None:
    """Print how many machines must join, and at which address, where neither torchrun nor Slurm has started them.

    torchrun and Slurm know where the machines are. Errors: UsageError where no other machine could find this process.
    """
    machines = trainer.num_nodes
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if machines < 2 or not isinstance(environment, LightningEnvironment):
        return
    alone = "on one machine type trainer.num_nodes=1"
    if "MASTER_PORT" not in os.environ:
        raise UsageError(
            f"trainer.num_nodes={machines} waits for {machines} machines, and no other one can find this process; {alone}, on "
            f"several start each with torchrun --nnodes={machines} --nproc-per-node=DEVICES --rdzv-backend=c10d "
            "--rdzv-endpoint=FIRST_MACHINE:29500 run.py ..., or with srun (docs/cluster.md)"
        )
    if leads():
        address = f"{environment.main_address}:{environment.main_port}"
        print(
            f"waiting for {machines} machines at {address} (this one is NODE_RANK={environment.node_rank()}); {alone}",
            file=sys.stderr,
            flush=True,
        )
