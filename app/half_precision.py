"""Half precision on a processor: whether its products are slower than those of float32, and what to type then.

Processors with instructions for bfloat16 gain from it. Others emulate them, at a fraction of the speed.
"""

import time

import torch
from lightning import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from app.ranks import leads
from callbacks.speed import DTYPES
from reporting.console import report_console

SLOW = 2.0  # times as long as in float32
HALF = (torch.bfloat16, torch.float16)
WEIGHTS = ("model.dtype", "pair.theta.dtype", "pair.target.dtype")


def product_slowdown(dtype: torch.dtype, rows: int = 64, width: int = 512) -> float:
    """The time of a product (rows, width) x (width, width) on the processor in `dtype`, over that in float32."""
    return _seconds(dtype, rows, width) / _seconds(torch.float32, rows, width)


def _seconds(dtype: torch.dtype, rows: int, width: int) -> float:
    """The shortest of three times, behind one that warms up."""
    left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times[1:])


def say_if_half_is_slow(
    cfg: DictConfig, module: LightningModule, trainer: Trainer, console: Console | None = None
) -> None:
    """One line where the run computes in half precision on a processor that is faster in float32."""
    if trainer.strategy.root_device.type != "cpu" or not leads():
        return
    kinds = {weight.dtype for weight in module.parameters() if weight.ndim == 2}
    kinds.add(DTYPES.get(str(trainer.precision), torch.float32))
    for dtype in (kind for kind in HALF if kind in kinds):
        slowdown = product_slowdown(dtype)
        if slowdown < SLOW:
            continue
        typed = [f"{name}=float32" for name in WEIGHTS if OmegaConf.select(cfg, name) not in (None, "float32")]
        typed += ["trainer.precision=32-true"] if str(trainer.precision) in DTYPES else []
        advice = f"; to compute in float32 type {' '.join(typed)}" if typed else ""
        line = f"this processor takes {slowdown:.0f} times as long for products in {str(dtype).removeprefix('torch.')}"
        (console or report_console()).print(f"{line} as in float32{advice}", highlight=False, soft_wrap=True)
