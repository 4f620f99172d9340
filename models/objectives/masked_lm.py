"""Masked language modelling (BERT): a few tokens are masked, all others visible. Texts are generated in random order."""

from torch import Generator, Tensor, nn

from models.backbones.bidirectional import any_order_nll, fill_nll, require_bidirectional
from models.functional.errors import UsageError
from models.functional.masked_lm import bert_corrupt
from models.functional.next_token import bidirectional_text
from models.interfaces.objective import Terms, TextObjective


class MaskedLM(TextObjective):
    """Mean cross entropy of the chosen tokens; prompts stay clean.

    rate: share of tokens that are chosen; of these 80 % are masked, 10 % random, 10 % left as they are.
    """

    likelihood = "bound"
    generation = "masked"
    attention = "bidirectional"

    def __init__(self, rate: float = 0.15) -> None:
        if not 0 < rate <= 1:
            raise UsageError(f"module.objective.rate={rate} must lie above 0 and at most at 1")
        self.rate = rate

    def attach(self, model: nn.Module) -> None:
        require_bidirectional(model, "masked_lm")

    def expected_predictions(self, batch: dict[str, Tensor]) -> float:
        return self.rate * int(bidirectional_text(batch)[2].sum())

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Terms:
        x0, attention_mask, maskable = bidirectional_text(batch)
        xt, chosen = bert_corrupt(x0, maskable, model.mask_id, len(model.embedding), generator, self.rate)
        nll = fill_nll(model, xt, x0, chosen, attention_mask)
        return Terms.over_tokens(nll.sum(), int(chosen.sum()), nll, predictions=chosen.sum())

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return any_order_nll(model, batch, generator)
