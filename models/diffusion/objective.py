"""The masked diffusion objective of LLaDA, in its pre-training and its prompt -> response (SFT) form.

Legend: B batch, L length, M masked positions, V vocabulary.
"""

from typing import Literal

import torch
from torch import Generator, Tensor

from models.backbones.bidirectional import any_order_nll, require_bidirectional
from models.backbones.llada import LladaModel
from models.functional.errors import UsageError
from models.functional.masked_diffusion import (
    antithetic_times,
    mask_probability,
    mask_tokens,
    masked_diffusion_nll,
    random_length,
)
from models.functional.next_token import whole_text
from models.interfaces.objective import ObjectiveOutput, TextObjective


class MaskedDiffusion(TextObjective):
    """CE / p over masked tokens, divided by the number of tokens that could be masked.

    form: `sft` keeps the prompt clean and counts response tokens (trailing end-of-text included); `pretrain` masks every
    real token and, with probability `random_length_probability`, cuts the batch to a random length. Of packed rows every
    token may be masked in both forms, and none is cut: a cut would lose tokens of the stream.
    """

    likelihood = "bound"
    loss_is_nll = True
    generation = "masked"
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
        self.form, self.eps, self.antithetic = form, eps, antithetic
        self.random_length_probability = random_length_probability

    def attach(self, model: LladaModel) -> None:
        require_bidirectional(model, "masked_diffusion")

    def __call__(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> ObjectiveOutput:
        x0, attention_mask, maskable = whole_text(batch)
        if self.form == "pretrain" and "labels" not in batch:
            length = random_length(x0.shape[1], generator, self.random_length_probability)
            x0, attention_mask = x0[:, :length], attention_mask[:, :length]
            maskable = attention_mask
        # 1. a time for each row, and its mask probability
        if self.antithetic:
            t = antithetic_times(len(x0), generator, x0.device)
        else:
            t = torch.rand(len(x0), generator=generator, device=x0.device)
        p = mask_probability(t, self.eps)
        # 2. the corrupted text
        xt, masked = mask_tokens(x0, maskable, p, model.mask_id, generator)
        # 3. logits of the masked positions only
        masked_logits = model.lm_head(model.hidden(model.embed(xt), attention_mask)[masked])
        # 4. their cross entropy, weighted by 1 / p
        nll = masked_diffusion_nll(masked_logits, x0, masked, p)
        return ObjectiveOutput(nll.sum(), int(maskable.sum()), nll)

    def text_nll(self, model: LladaModel, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return any_order_nll(model, batch, generator)
