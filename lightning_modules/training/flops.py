"""Floating point operations of what a model computes, counted product by product."""

from collections.abc import Callable
from typing import TypeVar

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")


def run_counted(run: Callable[[], Result]) -> tuple[Result, int]:
    """What run() returns, and the FLOPs of its matrix products and those of their gradients.

    The angles of rotary positions do not count: some versions of transformers make them by a matrix product.
    """
    # fused attention kernels of the CPU have no FLOP formula; the plain one is counted product by product
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
    flops = {name: sum(products.values()) for name, products in counter.get_flop_counts().items()}
    angles = sum(count for name, count in flops.items() if name.rpartition(".")[2] == "rotary_emb")
    return result, flops.get("Global", 0) - angles
