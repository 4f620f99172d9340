"""OnlineConceptModule: trains a causal LM whose middle layers read concepts alone, in one forward pass a batch.

Legend: B batch, T positions, V vocabulary.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lightning_modules.base import LeapModule
from lightning_modules.training.decoder_cost import synchronise
from lightning_modules.training.nll_meter import NllMeter
from models.backbones.causal_lm import causal_nll, require_causal, with_adapters
from models.backbones.code_space import require_whole_codes
from models.functional.next_token import CausalText, align_with_columns, causal_text, token_counts
from models.functional.nll import chosen_nll
from models.functional.paced import PacedAnnealing
from models.functional.vocabulary import vocabulary_size
from models.interfaces.decoder import Decoder
from models.online.codebook_update import CodebookUpdate
from models.online.concept_stack import CompressionSettings, Level
from models.online.cost import equal_layers, flops_share, measure_speed
from models.online.decoder import OnlineConceptDecoder
from models.online.files import load_baseline, save_online
from models.online.model import OnlineConceptModel
from models.online.options import OnlineConceptOptions
from models.online.rate_control import RateController, RateMultipliers
from models.online.terms import online_monitors, online_terms

MULTIPLIERS, PACE = "rate_multipliers", "paced_annealing"  # keys of a checkpoint


class OnlineConceptModule(LeapModule):
    """model: a causal LM in the layout of Llama and Qwen3.

    options: see `OnlineConceptOptions`; changes: some of them by name.
    """

    options_class: ClassVar[type] = OnlineConceptOptions

    def __init__(self, model: nn.Module, options: OnlineConceptOptions | None = None, **changes: Any) -> None:
        o = replace(options or OnlineConceptOptions(), **changes)
        super().__init__(lr=o.lr, weight_decay=o.weight_decay, warmup_steps=o.warmup_steps, seed=o.seed)
        require_causal(model, "online concepts")
        self.options = o
        self.save_hyperparameters(asdict(o))
        if o.lora_rank is not None:
            model = with_adapters(model, o.lora_rank)
        self.model = OnlineConceptModel(model, o, compression=o.compression[1], quantisation=o.quantisation[1])
        self.weights = o.term_weights()
        self.rates, self.codebooks = RateController(), CodebookUpdate(o.code_decay)
        multiplied = o.hold_rate and o.rate_control == "multiplier"
        self.multipliers = RateMultipliers(len(self.model.stacks())) if multiplied else None
        self.pace = None if o.gap_tolerance is None else PacedAnnealing(o.gap_tolerance)
        self.meter, self.truth_meter, self.base_meter = NllMeter(), NllMeter(), NllMeter()
        self.commit_rate = MeanMetric()
        self._cost: dict[str, float | None] = {}
        self._base: list[nn.Module] = []  # in a list, so that the baseline is no part of this module's weights

    def require_precision(self, precision: str) -> None:
        require_whole_codes(self.model, precision)

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        text, settings = causal_text(batch), self._settings(batch_idx)
        self.model.set_inference_settings(settings.compression, settings.quantisation)
        # 1. one forward pass: -log p of every target, and what each level did
        nll, levels = self._nll(text, settings)
        # 2. the text's loss and the auxiliary terms of routers and codes
        raw = {
            "text": nll.sum() / text.weights.sum().clamp(min=1),
            **online_terms(self.model, levels, text, settings.generator),
        }
        # 3. their weighted sum
        loss = sum(weight * raw[name] for name, weight in self.weights.items() if weight)
        if self.multipliers is not None:
            loss = loss + self.multipliers.loss(levels)
        # DDP waits for a gradient of every weight, also at compression 1 where a router decides nothing
        loss = loss + 0.0 * sum(p.sum() for p in self.model.stack.parameters())
        # 4. statistics for rate control and codebooks, which are updated once an optimiser step
        if self.multipliers is not None:
            self.multipliers.add_levels(levels)
        elif self.options.hold_rate:
            self.rates.add(levels)
        self.codebooks.add(levels, text.ids.shape[1], self.in_row_order)
        if self.pace is not None and self.global_step % self.options.gap_every == 0:
            self._measure_gap(self.pace, nll, text)
        # 5. monitors
        self.log("train/loss", loss, prog_bar=True)
        wanted: dict[str, Any] = {"wanted": settings.compression, "quantisation": settings.quantisation}
        if self.multipliers is not None:
            wanted |= {f"rate_multiplier_{k + 1}": value for k, value in enumerate(self.multipliers.values.tolist())}
        if self.pace is not None:
            wanted |= {
                "compression_gap": self.pace.gap,
                "plain_nll": self.pace.reference,
                "annealed": self.pace.progress,
            }
        self.log_monitors(raw | online_monitors(levels) | wanted)
        return self.refuse_nan(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Rate control and codebook updates: once an optimiser step, after its last micro-batch, the same on every rank."""
        stacks = self.model.stacks()
        self.rates.apply([stack.router for stack in stacks], self.gathered)
        if self.multipliers is not None:
            self.multipliers.apply(self.gathered)
        if self.pace is not None:
            self.pace.apply(1 / self.annealing_steps(self.options.anneal_share), self.gathered)
        spaces: list[Any] = [getattr(stack.codes, "space", None) for stack in stacks]
        dead = self.codebooks.apply(spaces, self.generator_of_all_ranks, start=self.global_step == 0)
        for k, count in dead.items():
            self.log(f"monitor/dead_codes{f'_{k + 1}' if k else ''}", float(count))

    def _nll(self, text: CausalText, settings: CompressionSettings | None = None) -> tuple[Tensor, list[Level]]:
        """-log p in nats of each target with a weight, 0 elsewhere, (B, T); and the result of each level."""
        valid = None if text.attention_mask is None else text.attention_mask.bool()
        states, levels = self.model.read(text.ids, valid, text.position_ids, settings, documents=text.document_ids)
        return chosen_nll(self.model.logits(states[text.weights]), text.targets, text.weights), levels

    @torch.no_grad()
    def _measure_gap(self, pace: PacedAnnealing, nll: Tensor, text: CausalText) -> None:
        """The loss of this batch, and that of the same weights without compression."""
        plain = self._nll(text, CompressionSettings(compression=1.0, quantisation=0.0))[0]
        pace.add(nll.detach().sum(), plain.sum(), text.weights.sum())

    def _settings(self, batch_idx: int) -> CompressionSettings:
        """The annealed values of this step."""
        o = self.options
        pairs = (o.compression, o.quantisation, o.temperatures, o.noise)
        if self.pace is None:
            values = [self.annealed(pair, o.anneal_share) for pair in pairs]
        else:
            values = [first + (last - first) * self.pace.progress for first, last in pairs]
        compression, quantisation, temperature, noise = values
        gated = self.global_step % o.gate_every == 0
        generator = self.step_generator(batch_idx)
        return CompressionSettings(compression, quantisation, temperature, noise, generator, gated)

    # -- likelihood ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        nll = self._measure(batch)
        self.log("val/loss", nll.sum() / max(1, token_counts(batch)), batch_size=token_counts(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        figures = self.meter.compute() | {"compression": 1 / float(self.commit_rate.compute())}
        for name, value in figures.items():
            self.log(f"val/{name}", value, sync_dist=True)  # the same on every rank: the meters sum over them

    def _measure(self, batch: dict[str, Tensor]) -> Tensor:
        text = causal_text(batch)
        nll, levels = self._nll(text)
        self.meter.update(align_with_columns(nll, batch), token_counts(batch), batch.get("target_bytes"))
        routing = levels[0].routing
        self.commit_rate.update(routing.realised, routing.valid.sum())
        return nll

    def _reset(self) -> None:
        for meter in (self.meter, self.truth_meter, self.base_meter, self.commit_rate):
            meter.reset()

    # -- comparison ---------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        self._reset()
        if self.options.baseline is not None and not self._base:
            self._base.append(load_baseline(self.options.baseline, self.model).to(self.device))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """The NLL of the batch's texts, and every decoder's responses where the batch has prompts."""
        self._measure(batch)
        if batch_idx == 0:
            self._cost = measure_speed(self.model, causal_text(batch), self._now)
        for base in self._base:
            self.base_meter.update(causal_nll(base, causal_text(batch)), token_counts(batch))
        if hasattr(self.trainer.datamodule, "true_nll"):
            self.truth_meter.update(self.trainer.datamodule.true_nll(batch), token_counts(batch))
        return super().test_step(batch, batch_idx) if "response_mask" in batch else {"results": []}

    def model_figures(self) -> dict[str, float]:
        figures = self.meter.compute()
        if not figures:
            return {}
        figures["compression"] = 1 / float(self.commit_rate.compute())
        for name, meter in (("nll_truth", self.truth_meter), ("baseline_nll", self.base_meter)):
            figures |= {name: meter.compute()["nll"]} if meter.update_called else {}
        return figures

    def model_cost(self) -> dict[str, float | None]:
        """Speed, memory and FLOPs; equal_layers: layers of a plain model with the same FLOPs, to train as a control."""
        if not self._cost:
            return {}
        realised = 1 / float(self.commit_rate.compute())
        share, layers = flops_share(self.model, realised), equal_layers(self.model, realised)
        return self._cost | {"flops_share": share, "equal_layers": layers}

    def decoder_figures(self, k: int) -> dict[str, dict[str, float | None]]:
        return {"quality": {}, "cost": self._cost if k < len(self.decoders()) else {}}

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def decoders(self) -> list[Decoder]:
        """Greedy, then sampled."""
        data = self.trainer.datamodule
        words = vocabulary_size(data.tokenizer)
        return [
            OnlineConceptDecoder(self.model, data.response_length, temperature=t, vocab_size=words)
            for t in (0.0, self.options.temperature)
        ]

    # -- files --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = {f"model.{name}" for name in self.model.kept_buffers()}
        kept = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] |= kept
        if self.multipliers is not None:
            checkpoint[MULTIPLIERS] = self.multipliers.state()
        if self.pace is not None:
            checkpoint[PACE] = self.pace.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.multipliers is not None:
            self.multipliers.load(checkpoint.get(MULTIPLIERS))
        if self.pace is not None:
            self.pace.load(checkpoint.get(PACE))

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the backbone (or its adapter) and the new weights beside it, for mode=generate."""
        return save_online(self.model, folder, tokenizer)
