"""UniformMixtureModule: all tokens in one forward pass under a uniform index, the baseline of plans that are learned.

u prompt, x text, k index. Legend: B batch, R response columns, K indices.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base import LeapModule
from lightning_modules.training.nll_meter import NllMeter
from models.backbones.abilities import require_free_attention
from models.backbones.causal_lm import require_causal
from models.functional.errors import require_at_least
from models.functional.vocabulary import vocabulary_size
from models.interfaces.decoder import Decoder
from models.plans.rows import prompt_of, require_all_columns, response_of
from models.plans.unified import UnifiedModel
from models.plans.uniform_mixture import MixtureDecoder, UniformMixture, index_vocabulary


class UniformMixtureModule(LeapModule):
    """model: a causal LM, which is read without a causal mask, as a parallel executor is. indices: K, see `UniformMixture`.

    temperature: of tokens in the sampled decoder. Validation logs `val/loss`, the exact -log p(x | u) in nats a column.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        indices: int = 128,
        temperature: float = 1.0,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
        require_at_least(1, module__indices=indices)
        require_at_least(0, module__temperature=temperature)
        require_causal(model, "a uniform mixture")
        require_free_attention(model, "a uniform mixture")
        self.save_hyperparameters(ignore=["model"])
        self.temperature = temperature
        vocabulary = index_vocabulary(indices, model.get_input_embeddings().num_embeddings)
        self.model = UnifiedModel(model, vocabulary)
        self.model.new_head.requires_grad_(False)  # an index is drawn, never predicted
        self.mixture = UniformMixture(self.model, indices, model.config.eos_token_id)
        self.rank_dependent_reason = "a rank reads each of its own prompts once; type trainer=ddp"
        self.exact, self.truth, self.index_bits = NllMeter(), NllMeter(), MeanMetric()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        self.mixture.end_ids = data.end_ids()
        require_all_columns(data, "a text of one forward pass")

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator, prompt, text = self.step_generator(batch_idx), prompt_of(batch), response_of(batch)
        # 1. E-step, exact: an index of each text from p(k | u, x), one forward pass an index without a gradient
        index = self.mixture.draw_index(prompt, text, generator)
        # 2. M-step: NLL of the text given that index, nats a column
        loss = self.mixture.nll(prompt, index, text).mean()
        self.log("train/loss", loss, prog_bar=True)
        return self.refuse_nan(loss)

    # -- figures ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        text = response_of(batch)
        nll = -self.mixture.log_prob(self.mixture.nll_of_indices(prompt_of(batch), text)) / text.shape[1]
        self.log("val/loss", nll.mean(), batch_size=len(text), sync_dist=True)
        return nll.mean()

    def on_test_epoch_start(self) -> None:
        for meter in (self.exact, self.truth, self.index_bits):
            meter.reset()

    @torch.no_grad()
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Every decoder's responses, and the exact likelihood of the batch's own texts."""
        text, data = response_of(batch), self.trainer.datamodule
        nll = self.mixture.nll_of_indices(prompt_of(batch), text)
        self.exact.update(-self.mixture.log_prob(nll), text.numel())
        self.index_bits.update(self.mixture.index_bits(nll))
        if hasattr(data, "true_nll"):
            self.truth.update(data.true_nll(batch).to(nll.device), text.numel())
        return super().test_step(batch, batch_idx)

    def model_figures(self) -> dict[str, float]:
        """nll_exact: -log p(x | u), nats a column; nll_truth: the corpus' own. index_bits: see `UniformMixture.index_bits`."""
        found, truth = self.exact.compute(), self.truth.compute()
        known = {"nll_truth": truth["nll"]} if truth else {}
        return {"nll_exact": found["nll"], "index_bits": float(self.index_bits.compute()), **known} if found else {}

    # -- comparison ---------------------------------------------------------------------------------------------------

    def decoders(self) -> list[Decoder]:
        """The most probable tokens of a uniform index, then sampled ones; one decoder where temperature is 0."""
        data = self.trainer.datamodule
        return [
            MixtureDecoder(
                self.mixture, data.response_length, temperature=t, vocab_size=vocabulary_size(data.tokenizer)
            )
            for t in dict.fromkeys((0.0, self.temperature))
        ]
