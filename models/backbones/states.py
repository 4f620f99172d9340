"""The last hidden states of a text in a causal or bidirectional body."""

from torch import Tensor, nn

from models.backbones.causal_lm import causal_hidden
from models.functional.attention import positions_from_mask
from models.functional.next_token import CausalText


def text_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None
) -> Tensor:
    """(B, L) ids, (B, L) bool -> (B, L, D) after the last norm. response_mask (B, L): see `fill_nll`."""
    if hasattr(model, "embed"):
        return model.hidden(model.embed(input_ids), attention_mask, response_mask=response_mask)
    positions = positions_from_mask(attention_mask)
    return causal_hidden(model, CausalText(input_ids, input_ids, attention_mask, attention_mask, positions))
