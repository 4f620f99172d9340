"""How a planner-executor's step comes by its plans: drawn with a gradient, or searched and kept; schedules of both.

u prompt, x text, z plan. Legend: B batch, S concept slots.
"""

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor

from models.functional.curriculum import length_limit, mean_of_short, text_lengths
from models.functional.errors import UsageError
from models.functional.plan_nll import plan_nll
from models.interfaces.probe_batch import EStep
from models.plans.hard_em import HardEM
from models.plans.planner import Coder, Plan, Planner, greedy, relaxed
from models.plans.quantiser import Quantiser
from models.plans.search import ExtraScore, Read
from models.plans.signals import SignalCodes, SignalHeads, repeated
from models.plans.unified import UnifiedModel


class PlanTraining:
    """A mixin of the module."""

    model: UnifiedModel
    planner: Planner
    posterior: Planner
    em: HardEM | None
    told: SignalCodes | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.wanted_signals and self.signals is None:
            data = self.trainer.datamodule
            if not hasattr(data, "signals"):
                raise UsageError(f"module.signals needs a corpus with signals, which {type(data).__name__} has none of")
            if self.signal_codes:
                self.told = SignalCodes(self.model.vocabulary, self.wanted_signals, data.signal_sizes)
            else:
                self.signals = SignalHeads(self.model, self.wanted_signals, data.signal_sizes).to(self.device)

    # -- plans --------------------------------------------------------------------------------------------------------

    def _straight_through(self, batch: dict[str, Tensor], generator: Generator) -> tuple[Read, dict[str, Tensor]]:
        """A drawn plan's block with its gradient, what the plan costs under p(z | u), and what else is asked of it."""
        relaxation, noise = (self.annealed(ends, self.anneal_share) for ends in (self.temperatures, self.noise))
        self.log_monitors({"temperature": relaxation, "noise": noise})
        plan = self._drawn(batch, generator, relaxation, noise)
        self.relaxation = tuple(e[plan.open_slots].detach() for e in (plan.soft_embeds, plan.hard_embeds))
        raw = self._plan_terms(plan, self._prior_logits(batch, plan.choices), self._text(batch))
        if self.told is not None:
            signals = self.trainer.datamodule.signals(batch)
            raw["signals"] = -self.told.log_prob(plan.logits.log_softmax(-1), signals).mean()
        return (plan.ids, plan.embeds), raw

    def _searched(self, batch: dict[str, Tensor], generator: Generator) -> tuple[Read, dict[str, Tensor]]:
        """The best plan's block, and what it costs under prior and posterior: all three are taught the same plan."""
        text, seen, prompt = self._text(batch), self._whole(batch), self._prompt(batch)
        own = batch["row"], prompt, seen, text
        extra_score = None if self.signals is None else self._told_by(batch)
        choices, figures = self.em.plans(*own, self.global_step, generator, self.gathered, extra_score)
        found, self.relaxation = self.em.found, None
        self.e_step = None if found is None else EStep(found.margins, found.gaps, found.flips)
        self.log_monitors(figures)
        is_open, raw = self.model.layout.open_slots(choices), {}
        for name, planner, read in (("planner", self.planner, prompt), ("posterior", self.posterior, seen)):
            log_p = planner.score(*read, choices).log_softmax(-1)
            raw[name] = plan_nll(log_p, choices, is_open).sum(-1).mean() / text.shape[1]
        return self.planner.block(choices), raw

    def _told_by(self, batch: dict[str, Tensor]) -> Callable[[Tensor], ExtraScore]:
        """For rows (B,) bool, log p(y | z) of their plans: a plan that cannot tell its text's signals is no good one."""

        def of(rows: Tensor) -> ExtraScore:
            signals = self.trainer.datamodule.signals(batch)

            def told(plans: Tensor) -> Tensor:
                many = repeated({name: value[rows] for name, value in signals.items()}, plans.shape[1])
                embeds = self.planner.block(plans.flatten(0, 1))[1]
                return self.signals.log_prob(embeds, many).view(plans.shape[:2])

            return told

        return of

    def on_fit_start(self) -> None:
        if self.em is not None:
            self.em.prepare(len(self.trainer.datamodule.rows["train"]))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.em is not None:
            self.em.step_begins()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.em is not None:
            self.em.step_ends()

    def _drawn(self, batch: dict[str, Tensor], generator: Generator, temperature: float, noise: float) -> Plan:
        """A plan from q(z | u, x) with a gradient to it; of a quantiser, which draws nothing, the codes of its points."""
        quantiser = self.model.quantiser
        if quantiser is None:
            return self.posterior.draw(*self._whole(batch), relaxed(generator, temperature, noise))
        if not self.training:
            return self._most_probable(batch)
        coder = Coder(quantiser, self._quantised_share(), self._known(batch))
        plan = self.posterior.draw(*self._whole(batch), coder)
        if quantiser.moving:
            self._move_codes(quantiser, coder.points)
        return plan

    def _known(self, batch: dict[str, Tensor]) -> dict[int, Tensor]:
        """Codes that are the values of signals: executor and prior never read what the posterior misread."""
        return {} if self.told is None else self.told.numbers(self.trainer.datamodule.signals(batch))

    def _most_probable(self, batch: dict[str, Tensor]) -> Plan:
        """The most probable plan whose known codes are as they are."""
        quantiser = self.model.quantiser
        coder = greedy if quantiser is None else Coder(quantiser, numbers=self._known(batch))
        return self.posterior.draw(*self._whole(batch), coder)

    def _move_codes(self, quantiser: Quantiser, points: dict[int, Tensor]) -> None:
        """After a batch, on all ranks alike; anew at the first step and where quantising begins."""
        points = {slot: self.in_row_order(own) for slot, own in points.items()}
        begins = round(self.quantise[0] * float(self.trainer.estimated_stepping_batches))
        begin = self.global_step in (0, begins)
        generator = self.generator_of_all_ranks()
        dead = quantiser.follow(points, self.code_decay, generator, begin=begin)
        self.log_monitors({"dead_codes": float(dead)})

    def _quantised_share(self) -> float:
        """0 until the first of `quantise`, 1 from the second on, shares of the steps."""
        first, last = (share * float(self.trainer.estimated_stepping_batches) for share in self.quantise)
        return min(1.0, max(0.0, (self.global_step - first) / max(1.0, last - first)))

    # -- schedules ----------------------------------------------------------------------------------------------------

    def _of_short(self, values: Tensor, text: Tensor) -> Tensor:
        """Mean of values (B,) over the texts whose turn has come."""
        if not self.curriculum:
            return values.mean()
        lengths = text_lengths(text, self.trainer.datamodule.tokenizer.eos_token_id)
        return mean_of_short(values, lengths, length_limit(self.progress(), self.curriculum, text.shape[1]))
