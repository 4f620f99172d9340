"""Cost per token: FLOPs beside those of the plain model by counting weights, speed and cache size by measuring.

Legend: B batch, R compression, positions a concept.
"""

from collections.abc import Callable

import torch
from torch import nn

from models.functional.next_token import CausalText
from models.online.concept_stack import ConceptStack
from models.online.decoder import IncrementalForward
from models.online.model import OnlineConceptModel

TIMED_ROWS, TIMED_TOKENS = 16, 32  # of a measurement of speed


def layer_weights(backbone: nn.Module) -> int:
    """Weights of one decoder layer that take part in matrix products."""
    return sum(p.numel() for p in backbone.get_decoder().layers[0].parameters() if p.ndim == 2)


def multiplied_weights(model: OnlineConceptModel, compression: float) -> float:
    """Weights in matrix products per token, output layer included; those of a concept count 1 / R. Without attention scores."""
    output, coded = _output_layer(model), model.inference_settings().quantisation > 0
    return _of_stack(model.stack, layer_weights(model.backbone), output, compression, coded) + output


def flops_share(model: OnlineConceptModel, compression: float) -> float:
    """FLOPs per token as a share of the backbone's, which reads every token in every layer."""
    plain = model.stack.size * layer_weights(model.backbone) + _output_layer(model)
    return multiplied_weights(model, compression) / plain


def equal_layers(model: OnlineConceptModel, compression: float) -> float:
    """Layers of a plain model of the same width with the same FLOPs per token."""
    return (multiplied_weights(model, compression) - _output_layer(model)) / layer_weights(model.backbone)


def _output_layer(model: OnlineConceptModel) -> int:
    return model.backbone.get_output_embeddings().weight.numel()


def _of_stack(stack: ConceptStack, layer: int, output: int, compression: float, coded: bool) -> float:
    ends = len(stack.shallow) + len(stack.deep)
    inner: float = len(stack.middle or ()) * layer
    if stack.inner is not None:
        inner = _of_stack(stack.inner, layer, output, compression, coded)
    bridge = stack.bridge.weight.numel()
    rest = len(stack.rest or ()) * layer
    token = (
        ends * layer + rest + bridge * (1 + (stack.carry is not None)) + stack.router.multiplied(stack.codes, output)
    )
    concept = inner + bridge * (stack.pool is not None) + (stack.codes.multiplied if coded else 0)
    return token + concept / compression


@torch.no_grad()
def measure_speed(model: OnlineConceptModel, text: CausalText, now: Callable[[], float]) -> dict[str, float | None]:
    """Tokens a second of prefill and of decoding, and bytes of cached keys and values per row at the end.

    text: its first `TIMED_ROWS` rows are the prompts; `TIMED_TOKENS` tokens are generated. now: seconds on the device's clock.
    """
    ids = text.ids[:TIMED_ROWS]
    valid = None if text.attention_mask is None else text.attention_mask[:TIMED_ROWS].bool()
    forward = IncrementalForward(model)
    forward.prefill(ids, valid)  # warm-up
    start = now()
    logits = forward.prefill(ids, valid)
    prefilled = now()
    for _ in range(TIMED_TOKENS):
        logits = forward.step(logits.argmax(-1))
    end = now()
    return {
        "prefill_tokens_per_s": ids.numel() / (prefilled - start),
        "decode_tokens_per_s": len(ids) * TIMED_TOKENS / (end - prefilled),
        "kv_bytes": forward.kv_bytes / len(ids),
        "batch": len(ids),
    }
