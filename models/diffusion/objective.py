"""The masked diffusion objective of LLaDA, in its pre-training and its prompt -> response (SFT) form.

Legend: B batch, L length, M masked positions, V vocabulary.
"""

from typing import Literal

from torch import Generator, Tensor

from models.backbones.bidirectional import any_order_nll, require_bidirectional
from models.backbones.llada import LladaModel
from models.functional.errors import UsageError, require_share
from models.functional.masked_diffusion import (
    antithetic_times,
    mask_probability,
    mask_tokens,
    masked_diffusion_nll,
    random_length,
    require_least_probability,
)
from models.functional.next_token import bidirectional_text
from models.functional.uniform import uniform
from models.interfaces.objective import Terms, TextObjective

SELDOM = 0.05  # cuts of more of the batches matter for the mean cost of a step


class MaskedDiffusion(TextObjective):
    """Cross entropy / p of the masked tokens, divided by the number of tokens that could be masked.

    form: `sft` keeps the prompt clean; response tokens can be masked, trailing end-of-text included. `pretrain` masks prompts
    too: every real token can be masked, and with probability `random_length_probability` a batch is cut to a random length.
    Packed rows are alike in both forms: every token can be masked and none is cut, as a cut would lose tokens of the stream.

    `text_nll`, and so `val/nll_bound`, covers the response given the prompt in both forms, as the corpus' `val/nll_truth` does.
    """

    likelihood = "bound"
    generation = "masked"
    kinds_of_batch = 16
    attention = "bidirectional"

    def __init__(
        self,
        form: Literal["sft", "pretrain"] = "sft",
        *,
        eps: float = 1e-3,
        antithetic: bool = True,
        random_length_probability: float = 0.01,
    ) -> None:
        if form not in ("sft", "pretrain"):
            raise UsageError(f"objective.form={form} is not known; type sft or pretrain")
        require_least_probability(eps)
        require_share(module__objective__random_length_probability=random_length_probability)
        self.form, self.eps, self.antithetic = form, eps, antithetic
        self.random_length_probability = random_length_probability

    def attach(self, model: LladaModel) -> None:
        require_bidirectional(model, "masked_diffusion")

    def masks_prompts(self, batch: dict[str, Tensor]) -> bool:
        return self.form == "pretrain" and "labels" not in batch

    def loss_is_nll(self, batch: dict[str, Tensor]) -> bool:
        return not self.masks_prompts(batch)

    def expected_predictions(self, batch: dict[str, Tensor]) -> float | None:
        """Of batches that are not cut: with `random_length_probability=0.01` cuts save half a percent of the FLOPs."""
        if self.masks_prompts(batch) and self.random_length_probability > SELDOM:
            return None
        return mask_probability(0.5, self.eps) * int(self._text(batch)[2].sum())

    def __call__(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> Terms:
        x0, attention_mask, maskable = self._text(batch)
        columns = x0.shape[1]
        if self.masks_prompts(batch):
            length = random_length(columns, generator, self.random_length_probability)
            x0, attention_mask, maskable = x0[:, :length], attention_mask[:, :length], maskable[:, :length]
        # 1. a time for each row, and its mask probability
        rows = len(x0)
        t = antithetic_times(rows, generator, x0.device) if self.antithetic else uniform(rows, generator=generator)
        p = mask_probability(t, self.eps)
        # 2. the corrupted text
        xt, masked = mask_tokens(x0, maskable, p, model.mask_id, generator)
        # 3. logits of the masked positions only
        response_mask = batch.get("response_mask")
        own = None if response_mask is None else response_mask[:, : x0.shape[1]]
        masked_logits = model.lm_head(model.hidden(model.embed(xt), attention_mask, response_mask=own)[masked])
        # 4. their cross entropy, weighted by 1 / p
        nll = masked_diffusion_nll(masked_logits, x0, masked, p)
        raw = {"predictions": masked.sum()} if x0.shape[1] == columns else {}
        return Terms.over_tokens(nll.sum(), int(maskable.sum()), nll, **raw)

    def text_nll(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return any_order_nll(model, batch, generator)

    def _text(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention_mask and what can be masked, (B, L) each."""
        x0, attention_mask, maskable = bidirectional_text(batch)
        return x0, attention_mask, attention_mask if self.masks_prompts(batch) else maskable
