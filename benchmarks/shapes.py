"""The models that the benchmarks measure: sizes as options, random weights.

Legend: B batch, L length, D width, V vocabulary.
"""

import argparse

import torch
from torch import nn

from models.backbones.llada import LladaModel, build_llada

MASK_ID, EOS_ID, PAD_ID = 2, 1, 0
FIRST_WORD_ID = 3


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Sizes of the base model and of the soft prompt; the defaults are those of the default job."""
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--width", type=int, default=96)
    sizes.add_argument("--layers", type=int, default=3)
    sizes.add_argument("--heads", type=int, default=4)
    sizes.add_argument("--intermediate", type=int, default=None, help="feed-forward width; 8/3 of --width if not given")
    sizes.add_argument("--prefix", type=int, default=16, help="length of the soft prompt")
    sizes.add_argument("--prompt-width", type=int, default=128, help="of the soft prompt's network")


def build_base(
    args: argparse.Namespace, device: torch.device, *, vocab_size: int, length: int, mask_id: int = MASK_ID
) -> LladaModel:
    """A base with random weights whose activations and logits keep an order of magnitude of 1."""
    base = build_llada(
        vocab_size=vocab_size,
        mask_token_id=mask_id,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=args.intermediate or 8 * args.width // 3,
        max_position_embeddings=length,
        rope_theta=10_000.0,
    )
    for weight in base.parameters():
        if weight.ndim >= 2:  # fresh weights are so small that any two gradients would look alike
            nn.init.normal_(weight, std=args.width**-0.5)
    return base.to(device).eval()
