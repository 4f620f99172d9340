"""Hard EM in a training: the plan that each row of a batch is trained on, searched at intervals and cached in between.

Legend: B rows of a batch on this rank, S slots.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from models.functional.errors import UsageError
from models.interfaces.executor import Executor
from models.plans.cache import PlanCache, Refresh
from models.plans.options import SearchOptions
from models.plans.planner import Planner
from models.plans.rows import Tokens
from models.plans.search import Found, PlanSearch


class SearchedPlans(NamedTuple):
    """choices (B, S); found: what this rank searched, None where no row was due; figures: of the search on all ranks."""

    choices: Tensor
    found: Found | None
    figures: dict[str, float]


class HardEM:
    """search: finds plans. begin, end: the shares of the steps between which a text is trained on its cached plan.

    interval, tolerance: as in `Refresh`.
    """

    def __init__(self, search: PlanSearch, *, begin: float, end: float, interval: int, tolerance: float) -> None:
        self.search, self.begin, self.end = search, begin, end
        self.refresh = Refresh(interval, tolerance)
        self.cache: PlanCache | None = None
        self.seconds = {"search": 0.0, "step": 0.0}
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
        prompt: Tokens,
        posterior_input: Tokens,
        text: Tensor,
        step: int,
        generator: Generator,
        gather: Callable[[Tensor], Tensor],
        extra_score: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> SearchedPlans:
        """The cached plans of rows (B,), searched again where they are due.

        posterior_input: what the posterior reads. gather: stacks a tensor of all ranks, (ranks, ...), so that every rank has
        the whole cache. extra_score: due rows (B,) bool, n of them true, and plans (n, K, S) -> nats (n, K), added to
        the score.
        """
        assert self.cache is not None, "call prepare first"
        start = time.perf_counter()
        # 1. the cached plans
        cached, known, due = self.cache.get(rows), self.cache.known(rows), self.cache.due(rows, step)
        scores, gaps = (torch.full(rows.shape, torch.nan, device=rows.device) for _ in range(2))
        chosen, found = cached, None
        # 2. the E-step of the rows that are due
        if due.any():
            read = [(ids[due], mask[due]) for ids, mask in (prompt, posterior_input)]
            added = None if extra_score is None else partial(extra_score, due)
            found = self.search(read[0], read[1], text[due], cached[due], known[due], generator, added)
            chosen = cached.index_put((due,), found.choices)
            scores[due], gaps[due] = (values.to(scores.dtype) for values in (found.scores, found.gaps))
        # 3. the same cache on every rank
        of_all_ranks = [gather(part).flatten(0, 1) for part in (rows, chosen, scores, gaps, due)]
        rows, choices, scores, gaps, due = of_all_ranks
        self.cache.put(rows[due], choices[due], scores[due], step)
        self.cache.adapt(gaps, step)
        self.seconds["search"] += time.perf_counter() - start
        figures = {"searched": float(due.float().mean()), "search_interval": float(self.cache.interval)}
        return SearchedPlans(chosen, found, figures)

    # -- time ---------------------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        self._started = time.perf_counter()

    def step_ends(self) -> None:
        self.seconds["step"] += time.perf_counter() - self._started

    @property
    def share(self) -> float:
        """Seconds of searching as a share of the seconds of all training steps so far, those before a checkpoint included."""
        return self.seconds["search"] / self.seconds["step"] if self.seconds["step"] else 0.0

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {} if self.cache is None else self.cache.state_dict() | {"seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting, self.cache = state or None, None
        self.seconds |= state.get("seconds", {})


def build_hard_em(
    options: SearchOptions | None, prior: Planner, posterior: Planner, executor: Executor
) -> HardEM | None:
    """None without options."""
    if options is None:
        return None
    search = PlanSearch(prior, posterior, executor, options.candidates, options.explore, options.prior_weight)
    return HardEM(search, begin=options.begin, end=options.end, interval=options.interval, tolerance=options.tolerance)
