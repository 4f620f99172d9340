"""Pairs of noise and the text where its flow ends: made in batches, kept for a while, replaced by fresh ones.

A pair is stored as ids and the seed of its noise, so that a pool is small and travels in checkpoints. What else the flow tells
on its way is there once, when the pair is made.
"""

from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from models.backbones.noisy_mask_student import NoisyMaskStudent
from models.decoding.noisy_mask import Network, follow_flow, start_rows
from models.functional.errors import UsageError, require_choice
from models.objectives.flow_intervals import FlowIntervals, Intervals

Coupling = Literal["flow", "independent"]


class EndpointPairs:
    """A pool of batches of pairs.

    ode_steps: forwards of the denoiser from noise to text. reuse: a batch is made at every so many-th draw, so this is how
    often a pair is seen on average. window: batches kept; the oldest goes first.
    coupling: `flow` pairs noise with the end of its own flow; `independent` with the batch's own text, whatever the noise:
        the control that shows what the coupling is for.
    """

    def __init__(
        self,
        *,
        ode_steps: int = 8,
        reuse: int = 4,
        window: int = 16,
        coupling: Coupling = "flow",
    ) -> None:
        for name, value in (("ode_steps", ode_steps), ("pair_reuse", reuse), ("pair_window", window)):
            if value < 1:
                raise UsageError(f"module.{name}={value} must be at least 1")
        require_choice("module.coupling", coupling, get_args(Coupling))
        self.ode_steps, self.reuse, self.window, self.coupling = ode_steps, reuse, window, coupling
        self.drawn = 0
        self.pool: list[dict[str, Tensor | int]] = []
        self.intervals: Intervals | None = None

    def draw(
        self, student: NoisyMaskStudent, denoiser: Network, batch: dict[str, Tensor], generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One batch of pairs: z_0 (B, L, D), masked (B, L), attention_mask (B, L), endpoint ids (B, L).

        Where pairs were made for it, `intervals` of their flows are there until the next draw.
        """
        self.intervals = None
        if self.drawn % self.reuse == 0:
            self.pool = [*self.pool, self._make(student, denoiser, batch, generator)][-self.window :]
        self.drawn += 1
        device = batch["input_ids"].device
        chosen = int(torch.randint(len(self.pool), (1,), generator=generator, device=generator.device))
        entry = self.pool[chosen]
        rows = {name: entry[name].to(device) for name in ("input_ids", "attention_mask", "response_mask")}
        begin = start_rows(student, rows, Generator(device=device).manual_seed(entry["seed"]))
        return begin.z, begin.masked, begin.attention_mask, rows["input_ids"]

    def _make(
        self, student: NoisyMaskStudent, denoiser: Network, batch: dict[str, Tensor], generator: Generator
    ) -> dict[str, Tensor | int]:
        device = batch["input_ids"].device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        endpoint, masked = batch["input_ids"], batch["response_mask"]
        if self.coupling == "flow":
            begin = start_rows(student, batch, Generator(device=device).manual_seed(seed))
            path = FlowIntervals(begin, self.ode_steps, generator)
            end = follow_flow(student, begin, forwards=self.ode_steps, step="ode", network=denoiser, path=path)
            endpoint, self.intervals = torch.where(masked, end, endpoint), path.result
        kept = {"input_ids": endpoint, "attention_mask": batch["attention_mask"], "response_mask": masked}
        return {"seed": seed, **{name: column.cpu() for name, column in kept.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "pool": list(self.pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.pool = state["drawn"], list(state["pool"])
