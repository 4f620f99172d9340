"""ConceptPlannerExecutorModule: a prompt becomes a short plan of discrete concepts, and the plan alone becomes the text.

u prompt, x text, z plan. Legend: B batch, R response columns, S concept slots.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.base import LeapModule
from models.backbones.causal_lm import require_causal, with_adapters
from models.backbones.code_space import Sampler, require_whole_codes
from models.functional.bag_of_words import bag_of_words_nll
from models.functional.bits_per_byte import token_nll
from models.functional.errors import require_choice
from models.functional.plan_nll import plan_nll
from models.functional.rows import response_columns
from models.interfaces.decoder import Decoder
from models.interfaces.figures import ModelFigures
from models.plans.bag import BagOfWords
from models.plans.decoder import PlannedDecoder
from models.plans.executor import Executor
from models.plans.files import save_plans
from models.plans.hard_em import build_hard_em
from models.plans.layout import Planning
from models.plans.meter import PlanMeter
from models.plans.options import check_options, check_signal_codes, pair
from models.plans.planner import Plan, Planner
from models.plans.probes import PlanProbes
from models.plans.terms import NAMES, plan_terms, slots_of
from models.plans.training import PlanTraining
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

# in a checkpoint: earlier plans of validation texts, a quantiser's codes, the best plans of training rows
BEFORE, CODES, FOUND = "concepts_before", "concepts_codes", "concepts_found"


class ConceptPlannerExecutorModule(PlanTraining, PlanProbes, LeapModule):
    """model: a causal LM, shared by planner and executor. types: {name: {"codes", "most", "least"}}, in planning order.

    weights: of each loss in `terms.NAMES`; 0 or none switches it off. free_bits: nats that each slot's KL may have for nothing.
    quota: concepts a text that the quota loss asks for.
    sampler: how the posterior chooses, `quantiser.Sampler`. planning: {"prior", "posterior"}: `layout.Planning` of each.
    posterior_reads: `all` (prompt and text) or `text`. search: hard EM, `hard_em.OPTIONS`; None trains straight through.
    signals: {type: signal of the corpus} that each type has to predict. signal_codes: whether the type's codes are the
    signal's values (`signals.SignalCodes`), for `ema_vq` or `fsq` without search. curriculum: share of the steps after which
    texts of all lengths count; shorter ones come first.
    quantise: shares of the steps between which a quantiser's points move to their codes. code_decay: of the codes' means.
    A weight is a number or a pair. Pairs go from their first to their second value, linearly over `anneal_share` of the
    steps. temperatures: the relaxation's. noise: 1 draws concepts from the posterior, 0 takes the most probable ones.
    corruption: share of the executor's words that are hidden from it in training.
    lora_rank: adapters that train in the backbone's place, beside the new tables; None trains all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        types: Mapping[str, Mapping[str, int | None] | None],
        weights: Mapping[str, float | Sequence[float]],
        sampler: Sampler = "gumbel_st",
        planning: Mapping[str, Planning] | None = None,
        posterior_reads: Literal["all", "text"] = "all",
        search: Mapping[str, float] | None = None,
        signals: Mapping[str, str] | None = None,
        signal_codes: bool = False,
        curriculum: float = 0.0,
        quantise: tuple[float, float] = (0.1, 0.4),
        code_decay: float = 0.99,
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
        check_options(weights, quota, temperatures, noise, corruption, anneal_share)
        self.save_hyperparameters(ignore=["model"])
        vocabulary = ConceptVocabulary(types, model.get_input_embeddings().num_embeddings)
        if lora_rank is not None:
            model = with_adapters(model, lora_rank)
        self.named = tuple(signals or ()) if signal_codes else ()
        self.model = UnifiedModel(model, vocabulary, sampler, self.named)
        planning = {"prior": "sequential", "posterior": "sequential"} | dict(planning or {})
        self.planner, self.executor = Planner(self.model, planning["prior"]), Executor(self.model)
        self.posterior = Planner(self.model, planning["posterior"], self.model.quantiser)
        require_choice("module.posterior_reads", posterior_reads, ("text", "all"))
        self.posterior_reads = posterior_reads
        self.em = build_hard_em(search, self.planner, self.posterior, self.executor)
        if self.em is not None:
            self.rank_dependent_reason = "a rank searches plans when its own rows are due; type module.search=null"
        self.bag = BagOfWords(self.model) if weights.get("bag") else None
        check_signal_codes(signal_codes, signals, sampler, search, weights.get("signals", 0.0))
        self.wanted_signals, self.signal_codes = signals, signal_codes
        self.signals = None  # the corpus knows their sizes
        self.curriculum = curriculum
        self.quantise, self.code_decay = tuple(quantise), code_decay
        self.weights = {name: pair(weights.get(name, 0.0)) for name in NAMES}
        self.free_bits, self.quota = free_bits, quota
        noise = noise if self.model.quantiser is None else (0.0, 0.0)  # a quantiser's plan is no draw
        self.temperatures, self.noise, self.corruption = tuple(temperatures), tuple(noise), tuple(corruption)
        self.anneal_share = anneal_share
        self.plan_temperature, self.temperature = plan_temperature, temperature
        names = [t.name for t in vocabulary.types]
        self.meter = PlanMeter(dict(zip(names, slots_of(vocabulary), strict=True)))
        self.figures = ModelFigures()
        self._before: dict[int, Tensor] = {}

    @property
    def probes(self) -> tuple[Any, ...]:
        return (self,)

    def require_precision(self, precision: str) -> None:
        require_whole_codes(self.model, precision)

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator = self.step_generator(batch_idx)
        hidden = self.annealed(self.corruption, self.anneal_share)
        # 1. a plan of each text: drawn from q(z | u, x) with a gradient to it, or the best one found
        searching = self.em is not None and self.em.active(self.progress())
        prepare = self._searched if searching else self._straight_through
        (ids, embeds), raw = prepare(batch, generator)
        # 2. what the text costs given the plan alone, some of its own words hidden; (B, R) nats
        text = self._text(batch)
        blank = torch.rand(text.shape, generator=generator, device=self.device) < hidden
        raw["text"] = self._of_short(token_nll(self.executor.logits(ids, embeds, text, blank), text).mean(-1), text)
        if self.bag is not None:
            raw["bag"] = self._of_short(bag_of_words_nll(self.bag(embeds), text), text)
        if self.signals is not None:
            raw["signals"] = -self.signals.log_prob(embeds, self.trainer.datamodule.signals(batch)).mean()
        # 3. the weighted sum
        loss = self._weighted(raw, {n: self.annealed(ends, self.anneal_share) for n, ends in self.weights.items()})
        self.log("train/loss", loss, prog_bar=True)
        share = {} if self.em is None else {"search_share": self.em.share}
        self.log_monitors(raw | share | {"corruption": hidden})
        return self.refuse_nan(loss)

    def _plan_terms(self, plan: Plan, prior_logits: Tensor, text: Tensor) -> dict[str, Tensor]:
        options = {"tokens": text.shape[1], "floor": self.free_bits, "quota": self.quota, "named": self.named}
        return plan_terms(plan, prior_logits, self.model.vocabulary, **options)

    def _prior_logits(self, batch: dict[str, Tensor], choices: Tensor) -> Tensor:
        return self.planner.score(*self._prompt(batch), choices)

    @staticmethod
    def _weighted(raw: dict[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        return sum(weight * raw[name] for name, weight in weights.items() if weight and name in raw)

    # -- batches ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _text(batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"][:, -response_columns(batch["response_mask"]) :]

    def _whole(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the posterior reads."""
        first = -response_columns(batch["response_mask"]) if self.posterior_reads == "text" else 0
        return batch["input_ids"][:, first:], batch["attention_mask"][:, first:]

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
        told = self.model.quantiser is not None and not self.training  # a quantiser's plan is no draw
        best = plan if told else self._most_probable(batch)
        again = self._written((best.ids, best.embeds), text.shape[1])
        # 4. what the corpus knows
        sums = {"text": nll.sum(-1), "shuffled": other.sum(-1), "rebuilt": (again == text).all(-1)}
        sums |= {name: price.sum(-1) for name, price in zip(("prior", "posterior"), prices, strict=True)}
        if hasattr(data, "true_nll"):
            sums["truth"] = data.true_nll(batch)
        plans = data.hidden_plans(batch) if hasattr(data, "hidden_plans") else None
        self.meter.update(sums, text.shape[1], best.choices, plans, before)
        if not self.trainer.testing:
            self._before[batch_idx] = best.choices
        elif plans is not None:
            self.meter.update_swaps(plans.roll(1, 0), self._swapped(batch, best.choices))
        raw = {"text": nll.mean(), **self._plan_terms(plan, prior, text)}
        return self._weighted(raw, {name: last for name, (_, last) in self.weights.items()})

    def _swapped(self, batch: dict[str, Tensor], choices: Tensor) -> Tensor:
        """Hidden plans (B, K, A) of the texts written with one type's concepts of the text before it in the batch."""
        told, length = [], response_columns(batch["response_mask"])
        for own in slots_of(self.model.vocabulary):
            mixed = choices.clone()
            mixed[:, own] = choices.roll(1, 0)[:, own]
            ids = torch.cat([batch["input_ids"][:, :-length], self._written(self.planner.block(mixed), length)], -1)
            told.append(self.trainer.datamodule.hidden_plans(batch | {"input_ids": ids}))
        return torch.stack(told, 1)

    # -- comparison ---------------------------------------------------------------------------------------------------

    def decoders(self) -> list[Decoder]:
        """Greedy plan and text, then both sampled."""
        length = self.trainer.datamodule.response_length
        settings = [(0.0, 0.0), (self.plan_temperature, self.temperature)]
        return [
            PlannedDecoder(
                self.planner, self.executor, length, plan_temperature=plan, temperature=text, vocab_size=self.words
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
        if "nll_truth" in figures:
            # most probable plans are a function of the text, so that H(x | z) = H(x) - H(z)
            data = self.trainer.datamodule
            told = figures["concept_bits"] * math.log(2) / data.response_length
            figures["nll_floor"] = data.facts()["entropy_nats_per_token"] - told
        if self.em is not None and self.em.share:
            figures["search_share"] = self.em.share
        # given its plan a text costs less than it does: not to be compared with what other models call their NLL
        return {"nll_given_plan": figures.pop("nll"), **figures, **self.figures.values} if figures else {}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Response ids (B, R) by the last of the decoders."""
        return self.decoders()[-1](batch, self.step_generator(batch_idx, stream=2, epoch=0))

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the model as a folder, adapters added in; `app.trained.load_planned` reads it."""
        options = dict(self.hparams) | {"module": type(self).__name__, "lora_rank": None}
        return save_plans(self.model, folder, options, tokenizer)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[BEFORE] = dict(self._before)
        if self.model.quantiser is not None:  # its codes are no parameters
            checkpoint[CODES] = dict(self.model.quantiser.named_buffers())
        if self.em is not None:
            checkpoint[FOUND] = self.em.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._before = {k: concepts.to(self.device) for k, concepts in checkpoint.get(BEFORE, {}).items()}
        if self.model.quantiser is not None:
            self.model.quantiser.load_state_dict(checkpoint[CODES], strict=False)
        if self.em is not None:
            self.em.load_state_dict(checkpoint.get(FOUND, {}))
