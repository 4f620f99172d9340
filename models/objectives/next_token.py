"""Next-token prediction: every token from those before it. Exact likelihood, left-to-right generation."""

from torch import Generator, Tensor, nn

from models.backbones.causal_lm import causal_nll, require_causal
from models.functional.next_token import align_with_columns, causal_text
from models.interfaces.objective import Terms, TextObjective


class NextToken(TextObjective):
    """Cross entropy of each next token; of prompt -> response rows the response's tokens count."""

    likelihood = "exact"
    generation = "autoregressive"

    def attach(self, model: nn.Module) -> None:
        require_causal(model, "next_token")

    def loss_is_nll(self, batch: dict[str, Tensor]) -> bool:
        return True

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Terms:
        text = causal_text(batch)
        nll = causal_nll(model, text)
        return Terms.over_tokens(nll.sum(), int(text.weights.sum()), align_with_columns(nll, batch))

    def text_nll(self, model: nn.Module, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return align_with_columns(causal_nll(model, causal_text(batch)), batch)
