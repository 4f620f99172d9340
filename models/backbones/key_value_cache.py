"""The name that transformers gives to a key-value cache: `cache` in newer releases, `past_key_values` in older ones."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaModel

from models.functional.errors import UsageError

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument with which a model or a decoder layer of this transformers release takes its cache."""
    return {CACHE_ARGUMENT: cache}


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache that a forward pass with use_cache=True returns. Errors: UsageError for a model that returns none."""
    if output.get(CACHE_ARGUMENT) is None:
        raise UsageError(
            f"{type(output).__name__} holds no key-value cache, so this model cannot generate token by token; type a model "
            "with one, such as model.path=Qwen/Qwen3-0.6B"
        )
    return output[CACHE_ARGUMENT]
