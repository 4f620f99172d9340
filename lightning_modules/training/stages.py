"""Several stages of training in one run: the stage of each step, and its learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.functional.errors import UsageError


@dataclass
class Stage:
    """share: of all steps. lr: peak learning rate, reached after warmup_steps, or a twentieth of the stage if that is less.

    first, last (exclusive): its steps, once the run's length is known.
    """

    name: str
    share: float
    lr: float
    warmup_steps: int = 100
    first: int = 0
    last: int = 0


class Stages:
    """{name: {"share", "lr"}} in the order of `names`, and "warmup_steps" where a stage has its own.

    Shares add up to 1; a stage with share 0 is left out.
    """

    def __init__(self, wanted: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
        for name, options in wanted.items():
            if name not in names:
                raise UsageError(f"module.stages.{name} is not known; the stages are {', '.join(names)}")
            if not 0 <= options["share"] <= 1 or options["lr"] <= 0:
                raise UsageError(f"module.stages.{name} needs a share from 0 to 1 and lr above 0, not {dict(options)}")
            for option in set(options) - {"share", "lr", "warmup_steps"}:
                raise UsageError(f"module.stages.{name}.{option} is not known; a stage has share, lr and warmup_steps")
            if options.get("warmup_steps", 0) < 0:
                raise UsageError(f"module.stages.{name}.warmup_steps={options['warmup_steps']} must be at least 0")
        self.all = [_stage(n, wanted[n]) for n in names if n in wanted]
        self.all = [stage for stage in self.all if stage.share > 0]
        total = sum(stage.share for stage in self.all)
        if abs(total - 1) > 1e-6:
            shares = ", ".join(f"module.stages.{stage.name}.share={stage.share:g}" for stage in self.all)
            raise UsageError(f"the stages' shares of the steps must add up to 1, not {total:g} ({shares})")

    def plan(self, steps: int) -> None:
        """Divide `steps` steps among the stages, at least one each where there are enough."""
        done = 0.0
        for k, stage in enumerate(self.all):
            stage.first = self.all[k - 1].last if k else 0
            done += stage.share
            latest = max(k + 1, steps - (len(self.all) - 1 - k))  # each later stage needs a step too
            stage.last = min(max(round(done * steps), stage.first + 1), latest, steps)
        self.all[-1].last = steps

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step, and the share of the stage that is over (0 to 1)."""
        stage = next((stage for stage in self.all if step < stage.last), self.all[-1])
        return stage, (step - stage.first) / max(1, stage.last - stage.first)

    def lr(self, step: int) -> float:
        """Linear warm-up over a twentieth of the stage (at most its warmup_steps), and a cosine to 0."""
        stage, progress = self.at(step)
        warmup = max(1, min(stage.warmup_steps, (stage.last - stage.first) // 20))
        rise = min(1.0, (step - stage.first + 1) / warmup)
        return stage.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _stage(name: str, options: Mapping[str, float]) -> Stage:
    warmup = int(options.get("warmup_steps", Stage.warmup_steps))
    return Stage(name, float(options["share"]), float(options["lr"]), warmup)
