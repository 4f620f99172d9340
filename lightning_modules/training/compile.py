"""How decoder layers are computed: compiled (compile=), or recomputed in the backward pass to save memory (recompute=)."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_modules.base import LeapModule
from lightning_modules.training.torch_2_11 import let_checkpoints_pass_tangents
from models.backbones.key_value_cache import CACHE_ARGUMENT
from models.functional.errors import UsageError, require_choice
from models.functional.weights import trainable_weights

BACKENDS = ("inductor", "aot_eager", "eager")


def compute_layers(module: LeapModule, backend: str | None, recompute: bool) -> LeapModule:
    """The module, every decoder layer of which is compiled by a backend of torch.compile and / or recomputed; in place.

    Errors: UsageError where there is no compiler, and where the module takes forward-mode derivatives: they do not pass
    through compiled layers, nor, where the layers train, through recomputed ones (their tangents are not there a second time).
    """
    layers = decoder_layers(module)
    trained = any(trainable_weights(layer) for layer in layers)
    instead = module.instead_of_forward_derivatives()
    advice = f"forward-mode derivatives do not pass through it; type {instead}"
    if backend is not None:
        require_choice("compile", backend, BACKENDS)
        if instead is not None:
            raise UsageError(f"compile={backend}: {advice}, or compile=null")
        require_compiler(backend)
    if recompute and trained and instead is not None:
        raise UsageError(f"recompute=true: {advice}, or recompute=false")
    for layer in layers:
        if recompute and "forward" not in vars(layer):  # not yet
            recompute_layer(layer)
        if backend is not None:
            layer.compile(backend=backend)
    return module


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def recompute_layer(layer: nn.Module) -> None:
    """Keep nothing of the layer but its inputs for the backward pass (Chen et al., Sublinear Memory Cost, 2016).

    A pass with a key-value cache is kept as it is: a second one would write to the cache again.
    """
    let_checkpoints_pass_tangents()
    forward = layer.forward

    def recomputed(*inputs: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled() and options.get(CACHE_ARGUMENT) is None:
            return checkpoint(forward, *inputs, use_reentrant=False, **options)
        return forward(*inputs, **options)

    layer.forward = recomputed


@contextmanager
def without_recomputation(module: nn.Module) -> Iterator[None]:
    """A context in which layers keep what their backward pass needs, so that each of their products is computed once."""
    recomputed = {layer: vars(layer).pop("forward") for layer in decoder_layers(module) if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in recomputed.items():
            layer.forward = forward


def require_compiler(backend: str) -> None:
    """Errors: UsageError where inductor would find no C++ compiler."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if backend == "inductor" and not any(map(shutil.which, names)):
        raise UsageError(
            f"compile=inductor needs a C++ compiler, and {', '.join(names)} is not there; install one, or type "
            "compile=aot_eager or compile=null"
        )
