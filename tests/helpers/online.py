"""Small online concept models in float64, and their slow reference: one forward pass per position."""

from types import MethodType

import torch
from torch import Tensor, nn

from helpers.causal import tiny_causal
from models.online.concept_stack import CompressionSettings, ConceptStack
from models.online.model import OnlineConceptModel

VOCABULARY = 13


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, its norms too (transformers works them out in float32)."""

    def norm(self, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model.double()


def tiny_online(split=(1, 2, 1), *, architecture="llama", seed=0, levels=1, **options) -> OnlineConceptModel:
    """Random weights everywhere, so that routers decide differently at different positions."""
    torch.manual_seed(seed)
    layers = sum(part if isinstance(part, int) else sum(part) for part in split)
    backbone = in_float64(tiny_causal(VOCABULARY, architecture=architecture, num_hidden_layers=layers))
    options = {"codes": 8, "most_nulls": 3, "compression": 2.0, "quantisation": 0.5} | options
    model = OnlineConceptModel(backbone, split=list(split), levels=levels, **options)
    with torch.no_grad():
        for stack in model.stacks():
            for part in (stack.router, stack.bridge, stack.carry, stack.pool):
                for weight in part.parameters() if part is not None else ():
                    weight.add_(0.3 * torch.randn_like(weight))
            surprise = {"entropy": 2.0, "draft": 2.2}  # what is usual for so few tokens
            stack.router.offset.fill_(surprise.get(options.get("growth"), 0.0))
    return model.eval()


def texts(rows: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def ragged(rows: int = 3, length: int = 11) -> list[Tensor]:
    """Texts of different lengths."""
    return [row[: length - 3 * k] for k, row in enumerate(texts(rows, length))]


def padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and valid (B, T) of texts of different lengths."""
    width = max(len(row) for row in rows)
    ids, valid = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for k, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[k, columns], valid[k, columns] = row, True
    return ids, valid


# -- one forward a position ----------------------------------------------------------------------------------------------


def naive_logits(model: OnlineConceptModel, row: Tensor, settings: CompressionSettings) -> Tensor:
    """Logits (T, V) of one text (T,), each from a forward of its own that has seen nothing behind it."""
    embeds = model.backbone.get_input_embeddings()(row)
    positions = torch.arange(len(row))
    states = naive_stack(model.stack, embeds, positions, settings, row)
    return model.logits(model.backbone.get_decoder().norm(states))


def naive_stack(
    stack: ConceptStack, embeds: Tensor, positions: Tensor, settings: CompressionSettings, tokens: Tensor | None = None
) -> Tensor:
    """(T, D), (T,) -> (T, D); tokens (T,) of an outermost stack."""
    every = range(1, len(embeds) + 1)
    known = [None if tokens is None else tokens[None, :t] for t in every]
    return torch.stack([_last(stack, embeds[:t], positions[:t], settings, known[t - 1]) for t in every])


def _last(
    stack: ConceptStack, embeds: Tensor, positions: Tensor, settings: CompressionSettings, tokens: Tensor | None
) -> Tensor:
    hidden = _layers(stack.shallow, embeds, positions)
    every = torch.ones(1, len(embeds), dtype=torch.bool)
    start = stack.router.start(1, embeds.device, embeds.dtype)
    read = hidden if stack.rest is None else _layers(stack.rest, hidden, positions)
    more = {"tokens": tokens, "compression": settings.compression}
    routing, _ = stack.router(read[None], every, start, stack.codes, **more)
    committed = routing.commit[0].nonzero().flatten()
    tau = int(committed.max()) if len(committed) else -1
    tail = torch.arange(tau + 1, len(embeds))
    slots = hidden[tail] + stack.bridge(stack.codes.normed(hidden[tail]))
    if len(committed):
        ended = (
            hidden[committed]
            if stack.pool is None
            else hidden[committed] + stack.pool(_tails(stack, hidden, committed))
        )
        coded = stack._code(ended[None], routing.probability[:, committed], settings).embeds[0]
        if stack.inner is None:
            concepts = _layers(stack.middle, coded, positions[committed])
        else:
            concepts = naive_stack(stack.inner, coded, positions[committed], settings)
        if stack.carry is not None:
            slots = slots + stack.carry(stack.codes.normed(concepts[-1:]))
        slots = torch.cat([concepts, slots])
    return _layers(stack.deep, slots, positions[torch.cat([committed, tail])])[-1]


def _tails(stack: ConceptStack, hidden: Tensor, committed: Tensor) -> Tensor:
    """The mean of the positions between each commit and the one before it, 0 where there are none."""
    first = [0, *(committed[:-1] + 1).tolist()]
    parts = [stack.codes.normed(hidden[a:b]) for a, b in zip(first, committed.tolist(), strict=True)]
    return torch.stack([part.sum(0) / max(1, len(part)) for part in parts])


def _layers(stack, states: Tensor, positions: Tensor) -> Tensor:
    """Plain causal layers over (N, D)."""
    return stack.run(states[None], positions[None], None)[0]


HALF = CompressionSettings(compression=2.0, quantisation=0.5)
