"""ConceptPlannerExecutorModule: a prompt becomes a short plan of discrete concepts, and the plan alone becomes the text.

u prompt, x text, z plan. Legend: B batch, R response columns, S concept slots.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_modules.base import LeapModule
from lightning_modules.plan_meter import PlanMeter
from lightning_modules.plan_probes import PlanProbes
from models.backbones.causal_lm import require_causal, with_adapters
from models.concept.decoder import PlannedDecoder
from models.concept.executor import Executor
from models.concept.files import save_plans
from models.concept.planner import Plan, Planner, greedy, relaxed
from models.concept.terms import NAMES, plan_terms
from models.concept.unified import UnifiedModel
from models.concept.vocabulary import ConceptVocabulary
from models.decoding.decoder import Decoder
from models.functional.bits_per_byte import token_nll
from models.functional.errors import UsageError
from models.functional.plan_nll import plan_nll
from models.functional.rows import response_columns

# what earlier plans of validation texts are called in a checkpoint
BEFORE = "concepts_before"


class ConceptPlannerExecutorModule(PlanProbes, LeapModule):
    """model: a causal LM, shared by planner and executor. types: {name: {"codes", "most", "least"}}, in planning order.

    weights: of each loss in `terms.NAMES`; 0 or none switches it off. free_bits: nats that each slot's KL may have for nothing.
    quota: concepts a text that the quota loss asks for.
    Three pairs go from their first to their second value, linearly over `anneal_share` of the steps. temperatures: the
    relaxation's. noise: 1 draws concepts from the posterior, 0 takes the most probable ones. corruption: share of the
    executor's words that are hidden from it in training.
    lora_rank: adapters that train in the backbone's place, beside the new tables; None trains all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        types: Mapping[str, Mapping[str, int | None] | None],
        weights: Mapping[str, float],
        free_bits: float = 0.0,
        quota: float | None = None,
        temperatures: tuple[float, float] = (1.0, 0.5),
        noise: tuple[float, float] = (1.0, 1.0),
        corruption: tuple[float, float] = (1.0, 0.0),
        anneal_share: float = 0.6,
        plan_temperature: float = 1.0,
        temperature: float = 1.0,
        lora_rank: int | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
        require_causal(model, "concepts")
        _check_options(weights, quota, temperatures, noise, corruption, anneal_share)
        self.save_hyperparameters(ignore=["model"])
        vocabulary = ConceptVocabulary(types, model.get_input_embeddings().num_embeddings)
        if lora_rank is not None:
            model = with_adapters(model, lora_rank)
        self.model = UnifiedModel(model, vocabulary)
        self.planner, self.executor = Planner(self.model), Executor(self.model)
        self.weights = {name: float(weights.get(name, 0.0)) for name in NAMES}
        self.free_bits, self.quota = free_bits, quota
        self.temperatures, self.noise, self.corruption = tuple(temperatures), tuple(noise), tuple(corruption)
        self.anneal_share = anneal_share
        self.plan_temperature, self.temperature = plan_temperature, temperature
        self.meter = PlanMeter()
        self.figures: dict[str, float] = {}
        self._before: dict[int, Tensor] = {}

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator = self.step_generator(batch_idx)
        relaxation, noise, hidden = map(self._annealed, (self.temperatures, self.noise, self.corruption))
        # 1. a plan of each text, drawn from q(z | u, x)
        plan = self._drawn(batch, generator, relaxation, noise)
        self.relaxation = tuple(e[plan.open_slots].detach() for e in (plan.soft_embeds, plan.hard_embeds))
        # 2. what the text costs given the plan alone, some of its own words hidden; (B, R) nats
        text = self._text(batch)
        blank = torch.rand(text.shape, generator=generator, device=self.device) < hidden
        nll = token_nll(self.executor.logits(plan.ids, plan.embeds, text, blank), text)
        # 3. what the plan costs under p(z | u), and what else is asked of it
        raw = {"text": nll.mean(), **self._plan_terms(plan, self._prior_logits(batch, plan.choices), text)}
        # 4. the weighted sum
        loss = self._weighted(raw)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"monitor/{name}": value for name, value in raw.items()})
        self.log_dict({"monitor/temperature": relaxation, "monitor/noise": noise, "monitor/corruption": hidden})
        return self.refuse_nan(loss)

    def _drawn(self, batch: dict[str, Tensor], generator: Generator, temperature: float, noise: float) -> Plan:
        """A plan from q(z | u, x) with a gradient to it."""
        return self.planner.draw(*self._whole(batch), relaxed(generator, temperature, noise))

    def _most_probable(self, batch: dict[str, Tensor]) -> Plan:
        return self.planner.draw(*self._whole(batch), greedy)

    def _plan_terms(self, plan: Plan, prior_logits: Tensor, text: Tensor) -> dict[str, Tensor]:
        options = {"tokens": text.shape[1], "floor": self.free_bits, "quota": self.quota}
        return plan_terms(plan, prior_logits, self.model.vocabulary, **options)

    def _prior_logits(self, batch: dict[str, Tensor], choices: Tensor) -> Tensor:
        return self.planner.score(*self._prompt(batch), choices)

    def _weighted(self, raw: dict[str, Tensor]) -> Tensor:
        return sum(weight * raw[name] for name, weight in self.weights.items() if weight)

    def _annealed(self, ends: tuple[float, float]) -> float:
        """From the first to the second value over the first `anneal_share` of the steps."""
        over = max(1.0, self.anneal_share * float(self.trainer.estimated_stepping_batches))
        return ends[0] + (ends[1] - ends[0]) * min(1.0, self.global_step / over)

    # -- batches ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _text(batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"][:, -response_columns(batch["response_mask"]) :]

    @staticmethod
    def _whole(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return batch["input_ids"], batch["attention_mask"]

    @staticmethod
    def _prompt(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        columns = response_columns(batch["response_mask"])
        return batch["input_ids"][:, :-columns], batch["attention_mask"][:, :-columns]

    # -- figures ------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.meter.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._measure(batch, batch_idx, self._before.get(batch_idx))
        self.log("val/loss", loss, batch_size=len(batch["input_ids"]), sync_dist=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        for name, value in self.meter.compute().items():
            self.log(f"val/{name}", value, sync_dist=True)  # the same on every rank: the meter sums over them

    @torch.no_grad()
    def _measure(self, batch: dict[str, Tensor], batch_idx: int, before: Tensor | None) -> Tensor:
        """Add the batch to the meter, with the same draws whenever it is measured; the loss without hidden words."""
        generator = self.step_generator(batch_idx, stream=1, epoch=0)
        text, data = self._text(batch), self.trainer.datamodule
        # 1. a drawn plan: its prices under posterior and prior, and the text's given it
        plan = self._drawn(batch, generator, self.temperatures[1], self.noise[1])
        prior = self._prior_logits(batch, plan.choices)
        nll = token_nll(self.executor.logits(plan.ids, plan.embeds, text), text)
        log_p, log_q = prior.log_softmax(-1), plan.logits.log_softmax(-1)
        prices = [plan_nll(logs, plan.choices, plan.open_slots) for logs in (log_p, log_q * self.noise[1])]
        # 2. the text given another text's plan
        other = token_nll(self.executor.logits(plan.ids.roll(1, 0), plan.embeds.roll(1, 0), text), text)
        # 3. the most probable plan, and the text that it is turned back into
        best = self._most_probable(batch)
        again = self._written(best, text.shape[1], generator)
        # 4. what the corpus knows
        sums = {"text": nll.sum(-1), "shuffled": other.sum(-1), "rebuilt": (again == text).all(-1)}
        sums |= {name: price.sum(-1) for name, price in zip(("prior", "posterior"), prices, strict=True)}
        if hasattr(data, "true_nll"):
            sums["truth"] = data.true_nll(batch)
        plans = data.hidden_plans(batch) if hasattr(data, "hidden_plans") else None
        self.meter.update(sums, text.shape[1], best.choices, plans, before)
        if not self.trainer.testing:
            self._before[batch_idx] = best.choices
        return self._weighted({"text": nll.mean(), **self._plan_terms(plan, prior, text)})

    def _written(self, plan: Plan, length: int, generator: Generator) -> Tensor:
        return self.executor.generate(plan.ids, plan.embeds, length, generator, temperature=0, vocab_size=self._words)

    @property
    def _words(self) -> int:
        return len(self.trainer.datamodule.tokenizer)

    # -- comparison ---------------------------------------------------------------------------------------------------

    def decoders(self) -> list[Decoder]:
        """Greedy plan and text, then both sampled."""
        length = self.trainer.datamodule.response_length
        settings = [(0.0, 0.0), (self.plan_temperature, self.temperature)]
        return [
            PlannedDecoder(
                self.planner, self.executor, length, plan_temperature=plan, temperature=text, vocab_size=self._words
            )
            for plan, text in settings
        ]

    def on_test_epoch_start(self) -> None:
        self.meter.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's responses, and the figures of the batch's own texts."""
        self._measure(batch, batch_idx, None)
        return super().test_step(batch, batch_idx)

    def model_figures(self) -> dict[str, float]:
        figures = self.meter.compute()
        # given its plan a text costs less than it does: not to be compared with what other models call their NLL
        return {"nll_given_plan": figures.pop("nll"), **figures, **self.figures} if figures else {}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Response ids (B, R) by the last of the decoders."""
        return self.decoders()[-1](batch, self.step_generator(batch_idx, stream=2, epoch=0))

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the model as a folder, adapters added in; `lightning_modules.trained.load_planned` reads it."""
        options = dict(self.hparams) | {"module": type(self).__name__, "lora_rank": None}
        return save_plans(self.model, folder, options, tokenizer)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[BEFORE] = dict(self._before)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._before = {k: concepts.to(self.device) for k, concepts in checkpoint.get(BEFORE, {}).items()}


def _check_options(
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
        if weight < 0:
            raise UsageError(f"module.weights.{name}={weight} must be at least 0; 0 switches it off")
    if not any(weights.values()):
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
