"""An `OnlineConceptModule` of a few weights."""

import torch

from helpers.causal import tiny_causal
from lightning_modules.online_concept import OnlineConceptModule
from models.online.options import TERMS

ALL = dict.fromkeys(TERMS, 1.0)
PLAIN = {"compression": (1.0, 1.0), "quantisation": (0.0, 0.0), "weights": {"text": 1.0}}


def body(vocab_size: int = 7, **options):
    torch.manual_seed(0)
    return tiny_causal(vocab_size, num_hidden_layers=3, **options)


def build(model=None, **options) -> OnlineConceptModule:
    torch.manual_seed(0)
    wanted = {
        "codes": 8,
        "most_nulls": 3,
        "compression": (1.0, 2.0),
        "weights": ALL,
        "lr": 3e-3,
        "warmup_steps": 1,
        "seed": 7,
    }
    return OnlineConceptModule(body() if model is None else model, **(wanted | options))


def oracle_body(data):
    ids = data.special_ids()
    return body(ids.pop("vocab_size"), **ids)
