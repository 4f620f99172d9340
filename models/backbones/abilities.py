"""What a causal LM of transformers can do: read from its configuration, or found by trying it on a few tokens.

Architectures differ in what they make of positions, masks and caches, and most of them ignore what they do not know.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.backbones.key_value_cache import CACHE_ARGUMENT, cache_argument
from models.functional.errors import UsageError

FULL = {"full_attention", "global"}
WINDOWED = {"sliding_attention", "local"}


def context_of(model: nn.Module) -> int | None:
    """How many positions a model can read; None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def limited_layers(config: PreTrainedConfig) -> set[str]:
    """Kinds of layers that do not attend to every earlier token, such as `sliding_attention`; empty where all do."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    if not kinds and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    return kinds - FULL


def attention_window(config: PreTrainedConfig) -> int | None:
    """How many tokens the layers with a window attend to; None where the configuration names no such number."""
    return getattr(config, "sliding_window", None) or getattr(config, "window_size", None)


def require_free_layout(model: nn.Module, columns: int, option: str) -> None:
    """Raise UsageError unless every layer sees all of so many columns, at positions and with a mask that are given.

    option: what to shorten where the columns are more than a sliding window holds.
    """
    config = model.config.get_text_config()
    arguments = inspect.signature(model.get_decoder().forward).parameters
    missing = [name for name in ("position_ids", CACHE_ARGUMENT) if name not in arguments]
    kinds, window = limited_layers(config), attention_window(config)
    if missing or kinds - WINDOWED:
        raise UsageError(
            f"a model of type {config.model_type} cannot read plans: "
            + (f"it takes no {missing[0]}" if missing else f"it has layers of {', '.join(sorted(kinds - WINDOWED))}")
            + "; type a model with full causal attention, such as model.path=Qwen/Qwen3-0.6B"
        )
    if kinds and (window is None or window < columns):
        raise UsageError(
            f"the {config.model_type} model has layers with a window of {window} tokens, and a prompt with its plan and "
            f"response needs {columns}; shorten {option}, or type a model with full causal attention, such as "
            "model.path=Qwen/Qwen3-0.6B"
        )


@torch.no_grad()
def require_left_to_right(model: nn.Module, option: str, path: str | Path) -> None:
    """Raise UsageError for a model whose logits change with later tokens, such as an encoder. option: that of its path."""
    with trial(model):
        logits = model(input_ids=_ids(model, [[1, 2, 3], [1, 2, 4]]), use_cache=False).logits
    if not alike(*logits[:, :2]):
        raise UsageError(
            f"{option}={path} holds a {model.config.model_type} model that reads texts in both directions; type the folder of "
            f"a model that generates from left to right, such as {option}=Qwen/Qwen3-0.6B"
        )


@torch.no_grad()
def require_free_attention(model: nn.Module, option: str, instead: str = "") -> None:
    """Raise UsageError for a causal model that stays causal where a mask lets every token see every other one.

    option: what needs it. instead: what to type to do without, ending in ", or ".
    """
    with trial(model) as device:
        ids = _ids(model, [[1, 2, 3], [1, 2, 4]])
        seen = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=device)
        states = model.get_decoder()(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
    if torch.equal(*states[:, 0]):
        raise UsageError(
            f"a model of type {model.config.model_type} cannot be read in both directions, which {option} needs; type "
            f"{instead}a model such as model.path=Qwen/Qwen3-0.6B"
        )


@torch.no_grad()
def require_separate_documents(model: nn.Module) -> None:
    """Raise UsageError where a document is read as if the one before it in a packed row were part of it."""
    first, second = [1, 2, 3, 4], [5, 6, 7]
    with trial(model) as device:
        ids = _ids(model, [first + second])
        positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, len(first) :]
        alone = model(input_ids=ids[:, len(first) :], use_cache=False).logits
    if not alike(packed, alone):
        raise UsageError(
            f"data.document_mask=true: a model of type {model.config.model_type} does not keep the documents of a row apart; "
            "type data.document_mask=false"
        )


@torch.no_grad()
def require_steps(model: nn.Module) -> None:
    """Raise UsageError unless padded prompts, read on token by token with a key-value cache, give the logits of the whole."""
    with trial(model) as device:
        ids = _ids(model, [[1, 2, 3, 4], [1, 1, 5, 6]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], position_ids=positions[:, :3], use_cache=True)
        cache = out.get(CACHE_ARGUMENT)
        same = False
        if cache is not None:
            own = {"position_ids": positions[:, 3:], "attention_mask": mask, "use_cache": True}
            last = model(input_ids=ids[:, 3:], **own, **cache_argument(cache)).logits[:, -1]
            texts = (ids[:1], ids[1:, 2:])
            whole = [model(input_ids=text, use_cache=False).logits[0, -1] for text in texts]
            same = alike(last, torch.stack(whole))
    if not same:
        raise UsageError(
            f"a model of type {model.config.model_type} cannot be read token by token from prompts of different lengths, so it "
            "cannot answer prompts; type a model with a key-value cache, such as model.path=Qwen/Qwen3-0.6B"
        )


def _ids(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Token ids (N, T) on the model's device. A vocabulary of fewer has some of them twice, neighbours never."""
    size = model.config.get_text_config().vocab_size
    return torch.tensor(rows, device=next(model.parameters()).device) % size


@contextmanager
def trial(model: nn.Module) -> Iterator[torch.device]:
    """The model without dropout for a few forward passes; its device."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for module in training:
            module.training = True


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of logits are the same up to rounding."""
    tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
    one, other = one.float(), other.float()
    scale = torch.maximum(one.abs().amax(), other.abs().amax()).clamp(min=1e-6)
    return torch.allclose(one / scale, other / scale, atol=tolerance, rtol=0.0, equal_nan=True)
