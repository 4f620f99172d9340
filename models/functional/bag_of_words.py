r"""NLL of the tokens of a text without their order, from one vector of logits.

.. math:: -\frac{1}{R} \sum_r \log \mathrm{softmax}(\ell)_{x_r}

Zhao et al. (1703.10960): an autoregressive decoder can ignore a latent; this loss cannot be low without it.
Legend: B batch, R tokens of a text, V vocabulary.
"""

from torch import Tensor


def bag_of_words_nll(logits: Tensor, text: Tensor) -> Tensor:
    """Mean over positions of -log p(x_r), nats a token, from logits (B, V) that are the same for all of text (B, R); (B,)."""
    return -logits.log_softmax(-1).gather(-1, text).mean(-1)
