"""Rows of prompt and response: prompt columns on the left, response columns on the right.

Legend: B rows, L columns, R response columns, the same in every row.
"""

from torch import Tensor


def response_columns(response_mask: Tensor) -> int:
    """R, from response_mask (B, L) bool."""
    return int(response_mask[0].sum())
