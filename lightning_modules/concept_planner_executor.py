"""ConceptPlannerExecutorModule: a prompt becomes a short plan of discrete concepts, and the plan alone becomes the text.

u prompt, x text, z plan. Legend: B batch, R response columns, S concept slots, C columns of a plan's block, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import LeapModule
from models.backbones.abilities import context_of, require_free_layout
from models.backbones.causal_lm import require_causal, with_adapters
from models.backbones.code_space import require_whole_codes
from models.backbones.point_buffer import PointBuffer
from models.functional.bag_of_words import bag_of_words_nll
from models.functional.curriculum import length_limit, mean_of_short, text_lengths
from models.functional.errors import UsageError
from models.functional.plan_nll import plan_nll
from models.functional.quota import QuotaMultipliers
from models.functional.rows import signals_of
from models.functional.vocabulary import vocabulary_size
from models.interfaces.decoder import Decoder
from models.interfaces.figures import ModelFigures
from models.interfaces.probe_batch import EStep
from models.plans.bag import BagOfWords
from models.plans.decoder import PlannedDecoder
from models.plans.executor import AutoregressiveExecutor
from models.plans.executors import build_executor
from models.plans.files import save_plans
from models.plans.hard_em import build_hard_em
from models.plans.history import PlanHistory
from models.plans.measurement import Block, Measurement
from models.plans.meter import PlanMeter
from models.plans.options import PlanOptions, plain
from models.plans.planner import Plan, Planner
from models.plans.probe import PlanProbe
from models.plans.rows import posterior_input, prompt_of, require_all_columns, response_of
from models.plans.signals import SignalCodes, SignalHeads, log_prob_of_plans, start_as_words
from models.plans.sources import KnownPlans, PlanSource, QuantisedPlans, SampledPlans, StepValues
from models.plans.terms import plan_terms
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

# keys of a checkpoint: plans of validation texts, a quantiser's codes, the best plans of training rows, the quota's multiplier
PREVIOUS, CODES, FOUND = "concepts_before", "concepts_codes", "concepts_found"
QUOTA = "quota_multiplier"


class ConceptPlannerExecutorModule(LeapModule):
    """model: a causal LM, shared by prior, posterior and executor. options, changes: see `PlanOptions`.

    source: where plans of texts come from. em: the search for better plans, None without one. probe: what monitors read.
    """

    options_class: ClassVar[type[PlanOptions]] = PlanOptions
    figures: ModelFigures

    def __init__(self, model: nn.Module, options: PlanOptions | None = None, **changes: Any) -> None:
        options = replace(options or self.options_class(), **changes)
        super().__init__(
            lr=options.lr,
            weight_decay=options.weight_decay,
            warmup_steps=options.warmup_steps,
            seed=options.seed,
            optimizer=options.optimizer,
        )
        require_causal(model, "concepts")
        self.options = options
        self.save_hyperparameters(plain(options))
        # 1. one network, which is planner and executor
        vocabulary = ConceptVocabulary(options.types, model.get_input_embeddings().num_embeddings)
        if options.lora_rank is not None:
            model = with_adapters(model, options.lora_rank)
        self.model = UnifiedModel(model, vocabulary, options.sampler, options.signal_types)
        # 2. prior p(z | u), posterior q(z | u, x), executor p(x | z)
        self.planner = Planner(self.model, options.filled_planning["prior"])
        self.posterior = Planner(self.model, options.filled_planning["posterior"], self.model.quantiser)
        self.executor = build_executor(self.model, options, self.model.backbone.config.eos_token_id)
        # 3. where the plan of a training text comes from
        self.signal_codes = SignalCodes(vocabulary, options.signals or {}) if options.signal_codes else None
        self.source = self.build_source()
        self.begun = False  # whether concepts have begun as their words
        self.points = PointBuffer()  # of a quantiser
        self.quota = QuotaMultipliers(1, options.quota_gain) if options.quota_gain else None
        self.em = build_hard_em(options.search_options, self.planner, self.posterior, self.executor)
        if self.em is not None:
            self.rank_dependent_reason = "a rank searches plans when its own rows are due; type module.search=null"
        # 4. what else a plan has to predict; the heads of signals are made once the corpus is known
        self.bag = BagOfWords(self.model) if options.filled_weights.get("bag") else None
        self.signals: SignalHeads | None = None
        # 5. figures
        self.probe = PlanProbe(self.planner, self.executor, self.source, options.posterior_reads)
        self.probes = (self.probe,)
        names = [t.name for t in vocabulary.types]
        self.meter = PlanMeter(dict(zip(names, vocabulary.type_slots, strict=True)))
        self.measurement = Measurement(self.planner, self.executor, self.source, self.meter)
        self.figures = ModelFigures()
        self.history = PlanHistory()

    def build_source(self) -> PlanSource:
        reads = self.options.posterior_reads
        if self.model.quantiser is None:
            return SampledPlans(self.posterior, reads)
        if self.signal_codes is not None and self.options.plans_known:
            self.model.quantiser.freeze_heads()
            return KnownPlans(self.planner, self.signal_codes)
        return QuantisedPlans(self.posterior, reads, self.model.quantiser, self.signal_codes)

    def require_precision(self, precision: str) -> None:
        require_whole_codes(self.model, precision)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        self.probe.tokenizer = data.tokenizer
        self.executor.end_ids = data.end_ids()
        if isinstance(self.executor, AutoregressiveExecutor):
            self.executor.padding = data.end_padding
        self._require_room(data)
        if self.options.executor == "parallel":
            require_all_columns(data, "module.executor=parallel")
        if not self.options.signals or self.signals is not None:
            return
        if not hasattr(data, "signal_sizes"):
            raise UsageError(f"module.signals needs a corpus with signals; {type(data).__name__} has none")
        if self.signal_codes is not None:
            self.signal_codes.require(data.signal_sizes)
            if isinstance(self.source, KnownPlans):
                self.signal_codes.require_known(data.rows)
            if stage == "fit" and self.options.code_words:
                self._start_as_words(data)
        else:
            self.signals = SignalHeads(self.model, self.options.signals, data.signal_sizes).to(self.device)

    def _start_as_words(self, data: Any) -> None:
        if self.begun:
            return
        if not hasattr(data, "signal_words"):
            raise UsageError(
                f"module.code_words=true needs a corpus whose signals have words; {type(data).__name__} has none; type "
                "module.code_words=false"
            )
        # a plan reads as "name The Mill, food Italian, ..." on a line of its own, and the text stands on the next
        comma, line = data.encode_texts([",", "\n"])
        begin = data.tokenizer.bos_token_id
        special = {"<BOS>": [] if begin is None else [begin], "<PLAN>": line, "<TEXT>": line, "<EOS>": comma}
        start_as_words(self.model, self.options.signals or {}, data.signal_words(), special)
        self.begun = True

    def _require_room(self, data: Any) -> None:
        """Raise UsageError unless the backbone can read a prompt, its plan and its response at once."""
        backbone, layout = self.model.backbone, self.model.layout
        shorten = "data.prompt_length or data.response_length"
        text = data.prompt_length + data.response_length
        require_free_layout(backbone, text + layout.columns + 2, shorten)
        positions, context = text + layout.text_start + 1, context_of(backbone)
        if context is not None and positions > context:
            raise UsageError(
                f"prompts and responses of {text} tokens need {positions} positions beside a plan, the model has {context}; "
                f"shorten {shorten}"
            )

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator, now, text = self.step_generator(batch_idx), self.step_values(), response_of(batch)
        # 1. a plan of each text and its losses: drawn with a gradient to the posterior, or the best one found by search
        searching = self.em is not None and self.em.active(self.progress())
        if searching:
            (ids, embeds), raw, monitors = self._searched_plan(batch, now, generator)
        else:
            ends_step = self.ends_optimizer_step(batch_idx)
            (ids, embeds), raw, monitors = self._drawn_plan(batch, now, generator, ends_step)
        # 2. NLL of the text given the plan alone, some of its own tokens hidden; nats a counted token
        nll = self.executor.training_nll(ids, embeds, text, now.hidden, generator)
        raw["text"] = self._curriculum_mean(nll, text)
        # 3. what else the plan has to predict: the text's tokens without their order, and its signals
        if self.bag is not None:
            raw["bag"] = self._curriculum_mean(bag_of_words_nll(self.bag(embeds), text), text)
        if self.signals is not None:
            raw["signals"] = -self.signals.log_prob(embeds, signals_of(batch)).mean()
        # 4. the weighted sum
        loss = weighted_sum(raw, now.weights)
        self.log("train/loss", loss, prog_bar=True)
        search_share = {} if self.em is None else {"search_share": self.em.share}
        self.log_monitors(raw | monitors | search_share | {self.options.hidden_name: now.hidden})
        return self.refuse_nan(loss)

    def _drawn_plan(
        self, batch: dict[str, Tensor], now: StepValues, generator: Generator, ends_step: bool
    ) -> tuple[Block, dict[str, Tensor], dict[str, float]]:
        """Plans with a gradient to the posterior, their losses, and figures for the log."""
        # 1. z from q(z | u, x), straight through
        plan, points = self.source.draw(batch, now, generator)
        self.probe.relaxation, self.probe.e_step = plan.relaxation, None
        self.probe.gradient.watch_plan(plan)
        monitors = {"temperature": now.temperature, "noise": now.noise}
        # 2. a quantiser's codes follow the points of the optimiser step's micro-batches, at the last of them
        for slot, own in points.items():
            self.points.add(slot, self.in_row_order(own))
        if points and ends_step:
            monitors["dead_codes"] = float(self._update_codes())
        # 3. losses of the plan: NLL under the prior p(z | u), rate, usage ...
        prior = self.planner.score(*prompt_of(batch), plan.choices)
        multiplier = 0.0 if self.quota is None else float(self.quota.values)
        raw = self._plan_terms(plan, prior, response_of(batch), multiplier)
        if self.quota is not None:
            assert self.options.quota is not None
            count = raw["concepts"].new_tensor([len(plan.choices)])
            self.quota.add((raw["concepts"] - self.options.quota) * count, count)
            monitors["quota_multiplier"] = multiplier
        if self.signal_codes is not None:
            log_q = plan.logits.log_softmax(-1)
            raw["signals"] = -self.signal_codes.log_prob(log_q, signals_of(batch)).mean()
        return (plan.ids, plan.embeds), raw, monitors

    def _searched_plan(
        self, batch: dict[str, Tensor], now: StepValues, generator: Generator
    ) -> tuple[Block, dict[str, Tensor], dict[str, float]]:
        """The best plans found, their NLL under prior and posterior, and figures for the log."""
        text, prompt, whole = response_of(batch), prompt_of(batch), self._posterior_input(batch)

        def log_prob_of_signals(due: Tensor, plans: Tensor) -> Tensor:
            """log p(y | z) of plans (n, K, S) of the due rows, (n, K): a good plan predicts its text's signals."""
            assert self.signals is not None
            own = {name: values[due] for name, values in signals_of(batch).items()}
            embeds = self.planner.block(plans.flatten(0, 1))[1]
            return log_prob_of_plans(self.signals, embeds.unflatten(0, plans.shape[:2]), own)

        assert self.em is not None
        # 1. E-step: the cached plans, searched again where they are due
        extra_score = None if self.signals is None else log_prob_of_signals
        searched = self.em.plans(
            batch["row"], prompt, whole, text, self.global_step, generator, self.gathered, extra_score
        )
        found = searched.found
        self.probe.relaxation = None
        self.probe.e_step = None if found is None else EStep(found.margins, found.gaps, found.flips)
        # 2. M-step: prior and posterior learn the same plan as the executor, nats a token of text
        is_open, raw = self.model.layout.open_slots(searched.choices), {}
        for name, planner, read in (("planner", self.planner, prompt), ("posterior", self.posterior, whole)):
            states = planner.slot_states(*read, searched.choices)
            if planner is self.posterior:
                self.probe.gradient.watch_states(states)
            log_p = planner.slot_logits(states, searched.choices).log_softmax(-1)
            raw[name] = plan_nll(log_p, searched.choices, is_open).sum(-1).mean() / self._tokens(text)
        return self.planner.block(searched.choices), raw, searched.figures

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The quota's multiplier: once an optimiser step, after its last micro-batch, the same on every rank."""
        if self.quota is not None:
            self.quota.apply(self.gathered)

    def _update_codes(self) -> int:
        """Move the codes to the step's points of all ranks; the number of dead codes that were reset.

        Codes begin anew (k-means) at the first step and at the step where points begin to move to their codes.
        """
        assert self.model.quantiser is not None
        begins = round(self.options.quantise[0] * float(self.trainer.estimated_stepping_batches))
        begin = self.global_step in (0, begins)
        points, generator = self.points.pop(), self.generator_of_all_ranks()
        return self.model.quantiser.follow(points, self.options.code_decay, generator, begin=begin)

    def _plan_terms(self, plan: Plan, prior_logits: Tensor, text: Tensor, multiplier: float = 0.0) -> dict[str, Tensor]:
        o = self.options
        return plan_terms(
            plan,
            prior_logits,
            self.model.vocabulary,
            tokens=self._tokens(text),
            floor=o.free_bits,
            quota=o.quota,
            multiplier=multiplier,
            signal_types=o.signal_types,
        )

    def _tokens(self, text: Tensor) -> Tensor:
        """Tokens of text (B, R) that a text's nats are divided by: the mean of what the executor counts, a scalar."""
        return self.executor.tokens_of(text).float().mean()

    def _posterior_input(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return posterior_input(batch, self.options.posterior_reads)

    def _curriculum_mean(self, values: Tensor, text: Tensor) -> Tensor:
        """Mean of values (B,) over the texts that are short enough for this step."""
        if not self.options.curriculum:
            return values.mean()
        lengths = text_lengths(text, self.trainer.datamodule.tokenizer.eos_token_id)
        limit = length_limit(self.progress(), self.options.curriculum, text.shape[1])
        return mean_of_short(values, lengths, limit)

    # -- schedules ----------------------------------------------------------------------------------------------------

    def step_values(self) -> StepValues:
        """The values of all schedules at this step."""
        o = self.options

        def annealed(ends: tuple[float, float]) -> float:
            return self.annealed(ends, o.anneal_share)

        weights = {name: annealed(ends) for name, ends in o.weight_ends.items()}
        return StepValues(
            annealed(o.temperatures), annealed(o.draw_noise), self._code_share(), annealed(o.hidden), weights
        )

    def final_values(self) -> StepValues:
        """The last values of all schedules, and no token hidden: with these texts are measured."""
        o = self.options
        weights = {name: last for name, (_, last) in o.weight_ends.items()}
        return StepValues(o.temperatures[1], o.draw_noise[1], 1.0, 0.0, weights)

    def _code_share(self) -> float:
        """0 until the first of `quantise`, 1 from the second on, linear between; shares of the steps."""
        first, last = (share * float(self.trainer.estimated_stepping_batches) for share in self.options.quantise)
        return min(1.0, max(0.0, (self.global_step - first) / max(1.0, last - first)))

    # -- search -------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.em is not None:
            self.em.prepare(len(self.trainer.datamodule.rows["train"]))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.em is not None:
            self.em.step_begins()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.em is not None:
            self.em.step_ends()

    # -- figures ------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.meter.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, choices = self._measure(batch, batch_idx, self.history.previous(batch["row"]))
        self.history.add(batch["row"], choices)
        self.log("val/loss", loss, batch_size=len(batch["input_ids"]), sync_dist=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.history.close(len(self.model.layout.slot_columns))
        for name, value in self.meter.compute().items():
            self.log(f"val/{name}", value, sync_dist=True)  # the same on every rank: the meter sums over them

    def _measure(
        self, batch: dict[str, Tensor], batch_idx: int, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the batch to the meter, with the same draws at every call; the loss and the most probable plans (B, S)."""
        generator, final = self.step_generator(batch_idx, stream=1, epoch=0), self.final_values()
        data, testing = self.trainer.datamodule, bool(self.trainer.testing)
        found = self.measurement.add(batch, data, final, generator, previous=previous, testing=testing)
        text = found.nll.sum() / found.tokens.sum().to(found.nll.dtype)
        raw = {"text": text, **self._plan_terms(found.plan, found.prior, response_of(batch))}
        return weighted_sum(raw, final.weights), found.choices

    # -- comparison ---------------------------------------------------------------------------------------------------

    def decoders(self) -> list[Decoder]:
        """Greedy plan and text, then both sampled; each with every number of refinements."""
        data, o = self.trainer.datamodule, self.options
        ends = None if data.end_padding else data.end_ids()
        return [
            PlannedDecoder(
                self.planner,
                self.executor.refining(further),
                data.response_length,
                plan_temperature=plan,
                temperature=text,
                vocab_size=vocabulary_size(data.tokenizer),
                end_ids=ends,
            )
            for plan, text in ((0.0, 0.0), (o.plan_temperature, o.temperature))
            for further in o.refinements
        ]

    def on_test_epoch_start(self) -> None:
        self.meter.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's responses, and the figures of the batch's own texts."""
        self._measure(batch, batch_idx)
        return super().test_step(batch, batch_idx)

    def model_figures(self) -> dict[str, float]:
        figures = self.meter.compute()
        if "nll_truth" in figures:
            # most probable plans are a function of the text, so that H(x | z) = H(x) - H(z)
            data = self.trainer.datamodule
            plan_nats = figures["concept_bits"] * math.log(2) / data.response_length
            figures["nll_floor"] = data.facts()["entropy_nats_per_token"] - plan_nats
        if self.em is not None and self.em.share:
            figures["search_share"] = self.em.share
        # the plan was made from the text: this NLL cannot be compared with the NLL of other models
        return {"nll_given_plan": figures.pop("nll"), **figures, **self.figures.values} if figures else {}

    def code_names(self, data: Any) -> dict[str, list[str]]:
        """The value that each code of a type stands for, of types whose codes are the values of a signal with names in data."""
        values = getattr(data, "signal_values", {})
        wanted = self.options.signals or {}
        return {name: values[wanted[name]] for name in self.options.signal_types if wanted[name] in values}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Response ids (B, R) by the last of the decoders."""
        return self.decoders()[-1](batch, self.step_generator(batch_idx, stream=2, epoch=0))

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the model as a folder, adapters merged; `app.trained.load_planned` reads it."""
        options = plain(self.options) | {"module": type(self).__name__, "lora_rank": None}
        return save_plans(self.model, folder, options, tokenizer)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.history.choices is not None:
            checkpoint[PREVIOUS] = self.history.choices
        if self.model.quantiser is not None:  # its codes are no parameters
            checkpoint[CODES] = dict(self.model.quantiser.named_buffers())
        if self.em is not None:
            checkpoint[FOUND] = self.em.state_dict()
        if self.quota is not None:
            checkpoint[QUOTA] = self.quota.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        previous = checkpoint.get(PREVIOUS)
        # older checkpoints hold the batches of one rank: the first validation then has no flip rate
        self.history.choices = previous if isinstance(previous, Tensor) else None
        if self.model.quantiser is not None:
            self.model.quantiser.load_state_dict(checkpoint[CODES], strict=False)
        if self.em is not None:
            self.em.load_state_dict(checkpoint.get(FOUND, {}))
        if self.quota is not None:
            self.quota.load(checkpoint.get(QUOTA))


def weighted_sum(raw: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the losses that have a weight and are there."""
    parts = (weight * raw[name] for name, weight in weights.items() if weight and name in raw)
    return sum(parts, next(iter(raw.values())).new_zeros(()))
