"""PretrainModule: one model, one injected objective. Teachers, baselines and judges are trained with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import LeapModule
from lightning_modules.training.compile import decoder_layers
from lightning_modules.training.nll_meter import NllMeter
from lightning_modules.training.step_cost import flops_of_step
from lightning_modules.training.token_weights import TokenWeights
from models.backbones.autoregressive import AutoregressiveDecoder
from models.backbones.bidirectional import is_block_causal
from models.backbones.causal_lm import save_causal, save_merged
from models.backbones.states import text_states
from models.diffusion.commit_rules import build_rules
from models.diffusion.readers import require_bidirectional_body
from models.diffusion.sampler import MaskedDiffusionDecoder, rule_decoders, sampling_blocks
from models.flow.denoiser_objective import ContinuousDiffusion
from models.flow.solver import NoisyMaskDecoder
from models.flow.student_files import save_whole_student
from models.functional.errors import UsageError
from models.functional.next_token import EndIds, token_counts
from models.functional.vocabulary import vocabulary_size
from models.functional.weights import trainable_weights
from models.interfaces.decoder import Decoder
from models.interfaces.figures import ModelFigures
from models.interfaces.masked_sampling import (
    CacheKind,
    MaskedSampling,
    Remasking,
    forwards_in_blocks,
)
from models.interfaces.objective import Generation, Likelihood, Objective, Terms, TextObjective
from models.interfaces.optimizer import OptimizerName

# streams of random draws, see `step_generator`
TRAINING_STREAM, VALIDATION_STREAM, LIKELIHOOD_STREAM = 0, 1, 2


class PretrainModule(LeapModule):
    """model: the network; objective: (model, batch, generator) -> `Terms`.

    forwards, temperature, temperatures, remasking, guidance, block_length, cache, cache_refresh, ends_last: `MaskedSampling`,
    which `trainer.test` compares. A model that generates from left to right uses the temperatures alone; one of block diffusion
    has the blocks of its objective. commit_rules: {rule: values}, more rows of masked models, whose forward passes follow the
    confidence (`models/diffusion/commit_rules.py`), at rule_temperature and in blocks of rule_block_length.
    A step's loss is the mean over the tokens of all its micro-batches and ranks, however many each of them has.
    Validation logs `val/loss`, what is minimised, and `val/nll` (nats per token), `val/perplexity` and `val/bits_per_byte` of
    the batch's scored tokens; the names of an objective with an upper bound end in `_bound`. `val/nll_truth` is the corpus'
    own NLL of the same tokens, where it knows it.
    figures: what is known of the model itself, whatever it generates; callbacks add theirs, and the report shows all.
    curve: the validation likelihood over time, a list of values for each name; a callback fills it.
    """

    figures: ModelFigures

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        optimizer: OptimizerName = "adamw",
        warmup_steps: int = 100,
        forwards: tuple[int, ...] = (1, 2, 4, 8, 16),
        temperature: float = 1.0,
        temperatures: tuple[float, ...] = (),
        remasking: Remasking = "random",
        guidance: float = 0.0,
        block_length: int | None = None,
        cache: CacheKind = "none",
        cache_refresh: int | None = None,
        commit_rules: dict[str, list[float]] | None = None,
        rule_temperature: float = 0.0,
        rule_block_length: int | None = None,
        ends_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed, optimizer=optimizer)
        self.save_hyperparameters(ignore=["model", "objective"])
        self.model, self.objective = model, objective
        self.sampling = masked_sampling(
            forwards=forwards,
            temperature=temperature,
            temperatures=temperatures,
            remasking=remasking,
            guidance=guidance,
            block_length=block_length,
            cache=cache,
            cache_refresh=cache_refresh,
            commit_rules=commit_rules,
            rule_temperature=rule_temperature,
            rule_block_length=rule_block_length,
            ends_last=ends_last,
        )
        self.rules = build_rules(commit_rules)
        self.figures = ModelFigures()
        self.curve: dict[str, list[float]] = {}
        self.meter, self.truth_meter, self.token_weights = NllMeter(), NllMeter(), TokenWeights()
        # an objective that is no `TextObjective` is trained by its loss alone, and generates as masked diffusion does
        self.likelihood: Likelihood | None = getattr(objective, "likelihood", None)
        self.generation: Generation | None = getattr(objective, "generation", "masked")
        # the corpus' own NLL of each text, where it knows it
        self._true_nll: Callable[[dict[str, Tensor]], Tensor] | None = None
        if isinstance(objective, TextObjective):
            objective.attach(model)
        # what the model cannot be sampled with is refused before it is trained
        sampling_blocks(model, block_length)
        sampling_blocks(model, rule_block_length, "rule_block_length")
        if cache != "none":
            self._require_cache(cache)

    def _require_cache(self, cache: str) -> None:
        if self.generation != "masked":
            raise UsageError(f"module.cache={cache} is for models that fill masks; type module.cache=none")
        require_bidirectional_body(self.model, cache)

    def blocks(self) -> list[nn.Module]:
        return [layer for layer in decoder_layers(self) if trainable_weights(layer)]

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms = self._terms(batch, batch_idx, TRAINING_STREAM)
        self._log_loss(terms, "train")
        return self.refuse_nan(terms.loss) * self.token_weights.weight(terms.weight, self.device)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if isinstance(self.objective, TextObjective):
            self.objective.before_step(self.progress())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.token_weights.finish(optimizer, self.trainer.accumulate_grad_batches, self.device)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if isinstance(self.objective, TextObjective):
            self.objective.after_step(self.model)

    def flops_of_step(self, batch: dict[str, Tensor]) -> float:
        """Model FLOPs of a forward and backward pass over the batch; see `step_cost.flops_of_step`."""
        flops = flops_of_step(self.objective, self.model, batch)
        self.zero_grad(set_to_none=True)
        return flops

    def _terms(self, batch: dict[str, Tensor], batch_idx: int, stream: int) -> Terms:
        return self.objective(self.model, batch, self.step_generator(batch_idx, stream))

    @property
    def _text_objective(self) -> TextObjective:
        assert isinstance(self.objective, TextObjective)
        return self.objective

    def _log_loss(self, terms: Terms, split: str) -> None:
        weight = max(1, terms.weight)
        self.log(f"{split}/loss", terms.loss, prog_bar=True, batch_size=weight, sync_dist=split == "val")

    # -- validation: the loss, and the likelihood of the texts --------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._start_measuring()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # 1. what is minimised
        terms = self._terms(batch, batch_idx, VALIDATION_STREAM)
        self._log_loss(terms, "val")
        if self.likelihood is not None:
            # 2. the NLL of the batch's scored tokens: the loss where it is that, else from forward passes of its own
            if self._text_objective.loss_is_nll(batch):
                assert terms.position_nll is not None
                assert terms.tokens is not None
                self.meter.update(terms.position_nll, terms.tokens, batch.get("target_bytes"))
            else:
                self._measure(batch, batch_idx)
            # 3. the corpus' own NLL of the same tokens
            self._measure_truth(batch)
        return terms.loss

    def on_validation_epoch_end(self) -> None:
        for name, value in self._likelihood_figures().items():
            self.log(f"val/{name}", value, sync_dist=True)  # the same on every rank: the meter sums over them

    def _start_measuring(self) -> None:
        self.meter.reset()
        self.truth_meter.reset()
        self._true_nll = getattr(self.trainer.datamodule, "true_nll", None)

    def _measure(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the NLL of the batch's scored tokens to the meter, with the same draws whenever it is measured."""
        generator = self.step_generator(batch_idx, LIKELIHOOD_STREAM, epoch=0)
        nll = self._text_objective.text_nll(self.model, batch, generator)
        self.meter.update(nll, token_counts(batch), batch.get("target_bytes"))

    def _measure_truth(self, batch: dict[str, Tensor]) -> None:
        if self._true_nll is not None:
            self.truth_meter.update(self._true_nll(batch), token_counts(batch))

    def _likelihood_figures(self) -> dict[str, float]:
        """What was measured, and the corpus' own NLL of the same tokens where it knows it."""
        if self.likelihood is None:
            return {}
        ending = "_bound" if self.likelihood == "bound" else ""
        figures = {name + ending: value for name, value in self.meter.compute().items()}
        if self._true_nll is not None:
            figures["nll_truth"] = self.truth_meter.compute()["nll"]
        return figures

    # -- comparison: the decoders, and the model itself ---------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        self._start_measuring()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's responses, where batches have prompts, and the NLL of the batch's own texts."""
        if self.likelihood is not None:
            self._measure(batch, batch_idx)
            self._measure_truth(batch)
        return super().test_step(batch, batch_idx) if "response_mask" in batch else {"results": []}

    def model_figures(self) -> dict[str, float]:
        return {**self.figures.values, **self._likelihood_figures()}

    def decoders(self) -> list[Decoder]:
        if self.generation is None:
            return []
        one_by_one = self.generation in ("autoregressive", "prefix")
        if one_by_one:
            data: Any = self.trainer.datamodule
            ends = None if data.end_padding else data.end_ids()
            return [self.decoder(data, 1, temperature, ends) for temperature in self.sampling.all_temperatures]
        # a flow has no temperature
        temperatures = self.sampling.all_temperatures if self.generation == "masked" else (self.sampling.temperature,)
        ends = self.trainer.datamodule.end_ids() if self.sampling.ends_last or self.rules else None
        scheduled = [self.decoder(None, n, t, ends) for t in temperatures for n in self.compared_forwards()]
        if self.generation != "masked" or not self.rules:
            return scheduled
        length = self.trainer.datamodule.response_length
        return [*scheduled, *rule_decoders(self.model, self.rules, self.sampling, length, ends)]

    def compared_forwards(self, data: Any = None) -> list[int]:
        """The numbers of forward passes in `forwards`; of block diffusion those that its blocks allow.

        data: the datamodule, that of the trainer where it is None; only read for block diffusion.
        """
        if not is_block_causal(self.model):
            return list(self.sampling.forwards)
        length = (data or self.trainer.datamodule).response_length
        return forwards_in_blocks(self.sampling.forwards, sampling_blocks(self.model, None), length)

    def decoder(self, data: Any, forwards: int, temperature: float, end_ids: EndIds = None) -> Decoder:
        """How the model answers prompts.

        data: the datamodule; only read for a model that generates from left to right. forwards: forward passes of any other.
        end_ids: where such a model stops; none where it has learned to fill a response with end tokens. With
            `module.ends_last`, the tokens that a model which fills masks commits last.
        Errors: UsageError for an objective that predicts no tokens.
        """
        if self.generation is None:
            raise UsageError(
                f"{type(self.objective).__name__} predicts no tokens, so it cannot generate; type module/objective=next_token"
            )
        if self.generation == "flow":
            assert isinstance(self.objective, ContinuousDiffusion)
            return NoisyMaskDecoder(self.objective.student, forwards, step="ode")
        if self.generation == "masked":
            options = self.sampling.options | {"temperature": temperature, "ends_last": self.sampling.last(end_ids)}
            return MaskedDiffusionDecoder(self.model, forwards, **options)
        return AutoregressiveDecoder(
            self.model,
            data.response_length,
            temperature=temperature,
            whole_prompt=self.generation == "prefix",
            vocab_size=vocabulary_size(data.tokenizer),
            end_ids=end_ids,
        )

    @torch.no_grad()
    def states(self, rows: dict[str, Tensor]) -> Tensor:
        """The hidden states of whole texts after the last layer, (B, L, D)."""
        objective = self.objective
        trained = objective.trained(self.model) if isinstance(objective, TextObjective) else self.model
        return text_states(trained, rows["input_ids"], rows["attention_mask"], rows.get("response_mask"))

    # -- files --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        whole = dict(checkpoint["state_dict"])
        super().on_save_checkpoint(checkpoint)
        # what an objective keeps without training it, such as an average of the model, is in no other file
        checkpoint["state_dict"] |= {name: value for name, value in whole.items() if name.startswith("objective.")}

    def export(self, folder: str | Path, tokenizer: Any = None, merged: bool = False) -> Path:
        """Write the model as a plain folder: an adapter for peft, `merged` or whole for transformers; a flow as a student."""
        if self.generation == "flow":  # the objective's student is what was trained
            assert isinstance(self.objective, ContinuousDiffusion)
            return save_whole_student(self.objective.student, folder, tokenizer)
        return (save_merged if merged else save_causal)(self.model, folder, tokenizer)


def masked_sampling(**options: Any) -> MaskedSampling:
    """Errors: UsageError that names module.<option>."""
    try:
        return MaskedSampling(**options)
    except UsageError as error:
        raise UsageError(f"module.{error}") from None
