"""Pairs of noise and the text where its flow ends: made in batches, used several times, replaced by new ones.

A pair is stored as ids and the seed of its noise, so that a pool is small and can be saved in checkpoints. Intervals of the
flow itself are not stored: they are returned once, when the pair is made.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from models.flow.flow_intervals import FlowIntervals, Intervals
from models.flow.path import NoisyMaskPath, PathSample, hide_response
from models.flow.solver import FewStep, Network, follow_flow
from models.functional.errors import UsageError, require_choice

Coupling = Literal["flow", "independent"]


class EndpointPairs:
    """A pool of batches of pairs. A pair is a sample at s = 0 whose x0 is the text where the flow of its noise ends.

    ode_steps: forward passes of the denoiser from noise to text. reuse: every so many draws a new batch is made, so this is
    how often a pair is used on average. window: batches in the pool; the oldest is dropped first.
    coupling: `flow` pairs noise with the end of its own flow. `independent` pairs it with the batch's own text, which the
        noise does not depend on: the control. observed_share: rows with part of the response given.
    student_forwards, few_step: the student's answers, whose jumps the intervals are. Numbers that divide ode_steps count;
        where none does, the intervals are the flow's own steps. With `refine` every jump is [0, 1].
    """

    def __init__(
        self,
        *,
        ode_steps: int = 8,
        reuse: int = 4,
        window: int = 16,
        coupling: Coupling = "flow",
        observed_share: float = 0.0,
        student_forwards: Sequence[int] = (),
        few_step: FewStep = "chain",
    ) -> None:
        for name, value in (("ode_steps", ode_steps), ("pair_reuse", reuse), ("pair_window", window)):
            if value < 1:
                raise UsageError(f"module.{name}={value} must be at least 1")
        require_choice("module.coupling", coupling, get_args(Coupling))
        self.ode_steps, self.reuse, self.window, self.coupling = ode_steps, reuse, window, coupling
        self.observed_share, self.few_step = observed_share, few_step
        chains = tuple(n for n in student_forwards if n > 1 and ode_steps % n == 0) or (ode_steps,)
        self.chains = (1,) if few_step == "refine" else chains
        self.drawn = 0
        self.pool: list[dict[str, Any]] = []

    def draw(
        self,
        path: NoisyMaskPath,
        denoiser: Network,
        batch: dict[str, Tensor],
        generator: Generator,
        interval_rows: int = 0,
    ) -> tuple[PathSample, Intervals | None]:
        """One batch of pairs; and, where a flow was followed to make pairs, intervals of its first `interval_rows` rows."""
        intervals = None
        if self.drawn % self.reuse == 0:
            made, intervals = self._make(path, denoiser, batch, generator, interval_rows)
            self.pool = [*self.pool, made][-self.window :]
        self.drawn += 1
        device = batch["input_ids"].device
        chosen = int(torch.randint(len(self.pool), (1,), generator=generator, device=generator.device))
        entry = self.pool[chosen]
        rows = {name: column.to(device) for name, column in entry.items() if name != "seed"}
        masked = rows["response_mask"]
        rows["response_mask"] = rows.get("response", masked)  # older checkpoints have no column of it
        return path.start_sample(rows, Generator(device=device).manual_seed(entry["seed"]), masked), intervals

    def _make(
        self,
        path: NoisyMaskPath,
        denoiser: Network,
        batch: dict[str, Tensor],
        generator: Generator,
        interval_rows: int,
    ) -> tuple[dict[str, Any], Intervals | None]:
        device = batch["input_ids"].device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        endpoint, masked = batch["input_ids"], hide_response(batch, self.observed_share, generator)
        intervals = None
        if self.coupling == "flow":
            start = path.start_sample(batch, Generator(device=device).manual_seed(seed), masked)
            if interval_rows:
                intervals = FlowIntervals(start, interval_rows, self.ode_steps, self.chains, generator, self.few_step)
            end = follow_flow(path, denoiser, start, forwards=self.ode_steps, step="ode", on_step=intervals)
            endpoint = torch.where(masked, end, endpoint)
        # response_mask: what is noise, as checkpoints have had it from the first
        kept = {"input_ids": endpoint, "attention_mask": batch["attention_mask"], "response_mask": masked}
        kept["response"] = batch["response_mask"]
        entry = {"seed": seed, **{name: column.cpu() for name, column in kept.items()}}
        return entry, None if intervals is None else intervals.result

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "pool": list(self.pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.pool = state["drawn"], list(state["pool"])
