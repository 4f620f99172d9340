"""Pairs of noise and the text where its flow ends: made in batches, kept for a while, replaced by fresh ones.

A pair is stored as ids and the seed of its noise, so that a pool is small and travels in checkpoints. What else the flow tells
on its way is there once, when the pair is made.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from models.flow.flow_intervals import FlowIntervals, Intervals
from models.flow.losses import hide_response
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.solver import FewStep, Network, follow_flow, start_rows
from models.functional.errors import UsageError, require_choice

Coupling = Literal["flow", "independent"]


class Pairs(NamedTuple):
    """z_0 (B, L, D), masked (B, L), attention_mask (B, L), endpoint ids (B, L)."""

    z0: Tensor
    masked: Tensor
    attention_mask: Tensor
    endpoint: Tensor


class EndpointPairs:
    """A pool of batches of pairs.

    ode_steps: forwards of the denoiser from noise to text. reuse: a batch is made at every so many-th draw, so this is how
    often a pair is seen on average. window: batches kept; the oldest goes first.
    coupling: `flow` pairs noise with the end of its own flow; `independent` with the batch's own text, whatever the noise:
        the control that shows what the coupling is for. observed_share: rows with part of the response given.
    student_forwards, few_step: answers whose jumps are told on the way. Those count that divide ode_steps, and the flow's own
        steps where none does.
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
        self.chains = tuple(n for n in student_forwards if n > 1 and ode_steps % n == 0) or (ode_steps,)
        self.drawn = 0
        self.pool: list[dict[str, Tensor | int]] = []

    def draw(
        self,
        student: NoisyMaskStudent,
        denoiser: Network,
        batch: dict[str, Tensor],
        generator: Generator,
        interval_rows: int = 0,
    ) -> tuple[Pairs, Intervals | None]:
        """One batch of pairs; and, where a flow was followed to make pairs, intervals of its first `interval_rows` rows."""
        intervals = None
        if self.drawn % self.reuse == 0:
            made, intervals = self._make(student, denoiser, batch, generator, interval_rows)
            self.pool = [*self.pool, made][-self.window :]
        self.drawn += 1
        device = batch["input_ids"].device
        chosen = int(torch.randint(len(self.pool), (1,), generator=generator, device=generator.device))
        entry = self.pool[chosen]
        rows = {name: entry[name].to(device) for name in ("input_ids", "attention_mask", "response_mask")}
        begin = start_rows(student, rows, Generator(device=device).manual_seed(entry["seed"]))
        return Pairs(begin.z, begin.masked, begin.attention_mask, rows["input_ids"]), intervals

    def _make(
        self,
        student: NoisyMaskStudent,
        denoiser: Network,
        batch: dict[str, Tensor],
        generator: Generator,
        interval_rows: int,
    ) -> tuple[dict[str, Tensor | int], Intervals | None]:
        device = batch["input_ids"].device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        endpoint, masked, path = batch["input_ids"], hide_response(batch, self.observed_share, generator), None
        if self.coupling == "flow":
            rows = batch | {"response_mask": masked}
            begin = start_rows(student, rows, Generator(device=device).manual_seed(seed))
            if interval_rows:
                path = FlowIntervals(begin, interval_rows, self.ode_steps, self.chains, generator, self.few_step)
            end = follow_flow(student, begin, forwards=self.ode_steps, step="ode", network=denoiser, path=path)
            endpoint = torch.where(masked, end, endpoint)
        kept = {"input_ids": endpoint, "attention_mask": batch["attention_mask"], "response_mask": masked}
        return {"seed": seed, **{name: column.cpu() for name, column in kept.items()}}, path and path.result

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "pool": list(self.pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.pool = state["drawn"], list(state["pool"])
