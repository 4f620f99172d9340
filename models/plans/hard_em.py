"""Hard EM as part of a training: which plan a batch's rows are trained on, searched now and then and kept between.

Legend: B rows of a batch on this rank, S slots.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from models.functional.errors import UsageError
from models.plans.cache import PlanCache, Refresh
from models.plans.search import ExtraScore, Found, PlanSearch, Read

OPTIONS = {
    "begin": 0.6,
    "end": 1.0,
    "candidates": 4,
    "explore": 0.25,
    "prior_weight": 1.0,
    "interval": 500,
    "tolerance": 0.5,
}


class HardEM:
    """search: finds plans. begin, end: the shares of the steps between which a text is trained on its kept plan.

    interval, tolerance: as in `Refresh`.
    """

    def __init__(self, search: PlanSearch, *, begin: float, end: float, interval: int, tolerance: float) -> None:
        self.search, self.begin, self.end = search, begin, end
        self.refresh = Refresh(interval, tolerance)
        self.cache: PlanCache | None = None
        self.seconds = {"search": 0.0, "step": 0.0}
        self.found: Found | None = None  # by the last search of this rank
        self._waiting: dict[str, Any] | None = None
        self._started = 0.0

    def active(self, progress: float) -> bool:
        """Whether a step is one of EM; progress: share of the steps that are over."""
        return self.begin <= progress < self.end

    def prepare(self, rows: int) -> None:
        """A cache for `rows` training rows, filled where a checkpoint brought one."""
        if self.cache is not None and len(self.cache.found) == rows:
            return
        self.cache = PlanCache(rows, len(self.search.prior.layout.slot_columns), self.refresh)
        if self._waiting is not None:
            held = len(self._waiting["found"])
            if held != rows:
                raise UsageError(
                    f"the checkpoint keeps plans of {held} training rows, data.train has {rows}; use the same rows"
                )
            self.cache.load_state_dict(self._waiting)

    def plans(
        self,
        rows: Tensor,
        prompt: Read,
        seen: Read,
        text: Tensor,
        step: int,
        generator: Generator,
        gather: Callable[[Tensor], Tensor],
        extra_score: Callable[[Tensor], ExtraScore] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The kept plans (B, S) of rows (B,), searched where they are due, and figures of that search.

        gather: stacks a tensor of all ranks, (ranks, ...), so that every rank keeps the whole cache. further: of the rows
        (B,) bool that are searched, what is added to their score.
        """
        start = time.perf_counter()
        # 1. what is kept
        kept, known, due = self.cache.get(rows), self.cache.known(rows), self.cache.due(rows, step)
        scores, gaps = (torch.full(rows.shape, torch.nan, device=rows.device) for _ in range(2))
        chosen, self.found = kept, None
        # 2. the E-step of the rows that are due
        if due.any():
            mine = [tuple(part[due] for part in read) for read in (prompt, seen)]
            more = None if extra_score is None else extra_score(due)
            found = self.search(*mine, text[due], kept[due], known[due], generator, more)
            chosen = kept.index_put((due,), found.choices)
            self.found = found
            scores[due], gaps[due] = (values.to(scores.dtype) for values in (found.scores, found.gaps))
        # 3. the same cache on every rank
        everyone = [gather(part).flatten(0, 1) for part in (rows, chosen, scores, gaps, due)]
        rows, everyones, scores, gaps, due = everyone
        self.cache.put(rows[due], everyones[due], scores[due], step)
        self.cache.adapt(gaps, step)
        self.seconds["search"] += time.perf_counter() - start
        figures = {"searched": float(due.float().mean()), "search_interval": float(self.cache.interval)}
        return chosen, figures

    # -- what it costs ------------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        self._started = time.perf_counter()

    def step_ends(self) -> None:
        self.seconds["step"] += time.perf_counter() - self._started

    @property
    def share(self) -> float:
        """Seconds of searching as a share of those of all training steps so far."""
        return self.seconds["search"] / self.seconds["step"] if self.seconds["step"] else 0.0

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {} if self.cache is None else self.cache.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting, self.cache = state or None, None


def build_hard_em(options: Mapping[str, float] | None, prior, posterior, executor) -> HardEM | None:
    """None without options. Errors: UsageError that names module.search.<option>."""
    if options is None:
        return None
    for name in options:
        if name not in OPTIONS:
            raise UsageError(f"module.search.{name} is not known; the options are {', '.join(OPTIONS)}")
    wanted = OPTIONS | dict(options)
    if not 0 <= wanted["begin"] <= wanted["end"] <= 1:
        raise UsageError(
            f"module.search.begin={wanted['begin']} and end={wanted['end']} must be shares of the steps in this order"
        )
    if wanted["candidates"] < 1 or wanted["interval"] < 1 or not 0 <= wanted["explore"] <= 1:
        raise UsageError("module.search needs candidates and interval of at least 1 and explore from 0 to 1")
    search = PlanSearch(
        prior, posterior, executor, int(wanted["candidates"]), wanted["explore"], wanted["prior_weight"]
    )
    options = {name: wanted[name] for name in ("begin", "end", "interval", "tolerance")}
    return HardEM(search, **options)
