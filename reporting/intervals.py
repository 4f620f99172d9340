"""Confidence intervals of means over runs."""

import math
from statistics import stdev

from scipy.stats import t as student_t


def half_width(values: list[float]) -> float | None:
    """Half of the 95 % interval of the mean (Student's t); None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
