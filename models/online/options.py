"""Options of online concepts that are refused before any long work, and the model that they are compared with."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from models.backbones.causal_lm import load_trained
from models.functional.errors import UsageError
from models.online.model import OnlineConceptModel
from models.online.terms import NAMES


def load_baseline(folder: str, model: OnlineConceptModel) -> nn.Module:
    """The model to compare with. Raises UsageError where it is none, or has another vocabulary."""
    base = load_trained(folder)
    if base.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"module.baseline={folder} has {base.config.vocab_size} tokens, this model {model.config.vocab_size}; "
            "type the folder of a model trained on the same corpus"
        )
    return base


def check_options(
    weights: Mapping[str, float],
    compression: tuple[float, float],
    quantisation: tuple[float, float],
    temperatures: tuple[float, float],
    noise: tuple[float, float],
    share: float,
    most_nulls: int,
    code_decay: float,
    gate_every: int,
    baseline: str | None,
) -> None:
    """Raise UsageError, naming module.<option>, for values that cannot work; weights by the names of `online_terms`."""
    for name, weight in weights.items():
        if name not in NAMES:
            raise UsageError(f"module.weights.{name} is not known; the terms are {', '.join(NAMES)}")
        if weight < 0:
            raise UsageError(f"module.weights.{name}={weight} must be at least 0; 0 switches it off")
    if not weights.get("text"):
        raise UsageError("module.weights.text must be above 0: it is the text's own loss; type module.weights.text=1")
    for option, pair, least, most, such in (
        ("compression", compression, 1, float("inf"), "[1.0, 4.0]"),
        ("quantisation", quantisation, 0, 1, "[0.0, 1.0]"),
        ("temperatures", temperatures, 1e-6, float("inf"), "[1.0, 0.5]"),
        ("noise", noise, 0, 1, "[1.0, 0.0]"),
    ):
        if len(pair) != 2 or min(pair) < least or max(pair) > most:
            raise UsageError(f"module.{option}={list(pair)} must be a first and a last value, such as {such}")
    if max(compression) > most_nulls + 1 > 1:
        raise UsageError(
            f"module.compression={list(compression)} leaves more tokens in a row without a concept than "
            f"module.most_nulls={most_nulls}; type module.most_nulls={2 * math.ceil(max(compression))}"
        )
    if not 0 <= share <= 1:
        raise UsageError(f"module.anneal_share={share} must lie between 0 and 1")
    if not 0 <= code_decay < 1:
        raise UsageError(f"module.code_decay={code_decay} must be at least 0 and less than 1, such as 0.99")
    if gate_every < 1:
        raise UsageError(f"module.gate_every={gate_every} must be at least 1: every step carries the gradient")
    if baseline is not None and not Path(baseline).is_dir():
        raise UsageError(
            f"module.baseline={baseline} is no folder; type that of a trained causal LM, <run folder>/model"
        )
