"""What a token costs beside the plain model's: multiplications by weights, output layer and what is new counted.

Legend: R compression, tokens a concept.
"""

from torch import nn

from models.online.concept_stack import ConceptStack
from models.online.model import OnlineConceptModel


def layer_weights(backbone: nn.Module) -> int:
    """Weights of a decoder layer that a token is multiplied with."""
    return sum(p.numel() for p in backbone.get_decoder().layers[0].parameters() if p.ndim == 2)


def multiplied_weights(model: OnlineConceptModel, compression: float) -> float:
    """Weights that a token is multiplied with, output layer included; a concept's count for 1 / R, attention not at all."""
    words, coded = _output_layer(model), model.kept_setting().quantisation > 0
    return _of_stack(model.stack, layer_weights(model.backbone), words, compression, coded) + words


def flops_share(model: OnlineConceptModel, compression: float) -> float:
    """Of those of the backbone when it reads every token in every layer."""
    plain = model.stack.size * layer_weights(model.backbone) + _output_layer(model)
    return multiplied_weights(model, compression) / plain


def equal_layers(model: OnlineConceptModel, compression: float) -> float:
    """Layers of a plain model of the same width that costs the same a token."""
    return (multiplied_weights(model, compression) - _output_layer(model)) / layer_weights(model.backbone)


def _output_layer(model: OnlineConceptModel) -> int:
    return model.backbone.get_output_embeddings().weight.numel()


def _of_stack(stack: ConceptStack, layer: int, words: int, compression: float, coded: bool) -> float:
    ends = len(stack.shallow) + len(stack.deep)
    inner = len(stack.middle or ()) * layer
    if stack.inner is not None:
        inner = _of_stack(stack.inner, layer, words, compression, coded)
    bridge = stack.bridge.weight.numel()
    token = ends * layer + bridge * (1 + (stack.carry is not None)) + stack.router.multiplied(stack.codes, words)
    concept = inner + bridge * (stack.pool is not None) + (stack.codes.multiplied if coded else 0)
    return token + concept / compression
