"""The largest batch that fits a device."""

import gc
from collections.abc import Callable

import torch

MOST = 2**16  # rows; what fits more is not limited by memory


def largest_batch(peak_of: Callable[[int], int | None], limit: float | None, most: int = MOST) -> int:
    """The largest power of two, up to `most`, that fits; 0 where not even one row does.

    peak_of: runs a batch of so many rows and returns the most bytes that it took, or None. limit: bytes that it may take; None:
    as many as the device gives before it raises `torch.OutOfMemoryError`.
    """
    batch, fits = 1, 0
    while batch <= most:
        try:
            peak = peak_of(batch)
        except torch.OutOfMemoryError:
            failed = True  # the error holds what the batch had made until it has been handled
        else:
            failed = limit is not None and (peak or 0) > limit
        if failed:
            give_back()
            break
        fits, batch = batch, 2 * batch
    return fits


def give_back() -> None:
    """Give back what a batch that failed has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
