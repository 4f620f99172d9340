"""Which process of a run this one is. Imports nothing that takes time."""

import os


def leads() -> bool:
    """Whether this process is the first of its run; the others work where it does."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
