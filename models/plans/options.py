"""What the options of a planner-executor have to satisfy, one sentence a mistake."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.functional.errors import UsageError
from models.plans.terms import NAMES


def pair(weight: float | Sequence[float]) -> tuple[float, float]:
    """A weight's first and last value; a single number is both."""
    first, last = weight if isinstance(weight, Sequence) else (weight, weight)
    return float(first), float(last)


def check_options(
    weights: Mapping[str, float],
    quota: float | None,
    temperatures: tuple[float, float],
    noise: tuple[float, float],
    corruption: tuple[float, float],
    share: float,
) -> None:
    for name, weight in weights.items():
        if name not in NAMES:
            raise UsageError(f"module.weights.{name} is not known; the losses are {', '.join(NAMES)}")
        if min(pair(weight)) < 0:
            raise UsageError(f"module.weights.{name}={weight} must be at least 0; 0 switches it off")
    if not any(map(any, map(pair, weights.values()))):
        raise UsageError("module.weights are all 0; type for example module.weights.text=1 module.weights.planner=1")
    if weights.get("quota") and quota is None:
        raise UsageError("module.weights.quota needs a number of concepts a text; type for example module.quota=3")
    if len(temperatures) != 2 or min(temperatures) <= 0:
        raise UsageError(f"module.temperatures={list(temperatures)} must be two numbers above 0, such as [1.0, 0.5]")
    if len(noise) != 2 or not 0 <= noise[0] <= 1 or noise[1] not in (0, 1):
        raise UsageError(f"module.noise={list(noise)} must begin between 0 and 1 and end in 0 or 1, such as [0.0, 1.0]")
    if len(corruption) != 2 or min(corruption) < 0 or max(corruption) > 1:
        raise UsageError(f"module.corruption={list(corruption)} must be two shares from 0 to 1, such as [0.5, 0.0]")
    if not 0 <= share <= 1:
        raise UsageError(f"module.anneal_share={share} must lie between 0 and 1")


def check_signal_codes(wanted: bool, signals: Any, sampler: str, search: Any, weight: float | Sequence[float]) -> None:
    """weight: of the loss `signals`."""
    if wanted and not signals:
        raise UsageError("module.signal_codes=true needs signals; type for example module.signals={a: who}")
    if wanted and sampler == "gumbel_st":
        raise UsageError("module.signal_codes=true draws no codes; type module.sampler=ema_vq or module.sampler=fsq")
    if wanted and search is not None:
        raise UsageError(
            "module.signal_codes=true leaves nothing to search for in those types; type module.search=null"
        )
    if wanted and not max(pair(weight)):
        raise UsageError(
            "module.signal_codes=true leaves the posterior to the loss signals; type for example module.weights.signals=0.1"
        )
