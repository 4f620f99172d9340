"""Models that a run left in a folder, and the decoder that each answers with."""

from pathlib import Path

from torch import nn

from models.backbones import causal_lm
from models.backbones.autoregressive import AutoregressiveDecoder
from models.interfaces.decoder import Decoder
from models.online.decoder import OnlineConceptDecoder
from models.online.files import is_online, load_online
from models.online.model import OnlineConceptModel


def load_trained(folder: str | Path) -> nn.Module:
    """A causal LM, an adapter on one, or an online concept model. Errors: UsageError for a folder that is none of them."""
    return load_online(folder) if is_online(folder) else causal_lm.load_trained(folder)


def trained_decoder(model: nn.Module, response_length: int, temperature: float, vocab_size: int) -> Decoder:
    """From left to right with key-value caches, whichever of them it is."""
    online = isinstance(model, OnlineConceptModel)
    return (OnlineConceptDecoder if online else AutoregressiveDecoder)(
        model, response_length, temperature=temperature, vocab_size=vocab_size
    )
