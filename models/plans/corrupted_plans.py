"""Corrupted plans: random codes, and plans of which some concepts are hidden from the executor.

Legend: B batch, S slots, C columns of a plan's block, D width.
"""

import torch
from torch import Generator, Tensor

from models.functional.uniform import uniform
from models.plans.planner import Planner
from models.plans.vocabulary import END, ConceptVocabulary


def random_plan(vocabulary: ConceptVocabulary, choices: Tensor, generator: Generator) -> Tensor:
    """Choices (B, S) with each code replaced by a random one of its type; ends stay where they are."""
    codes = vocabulary.slot_codes.to(choices.device)
    drawn = uniform(*choices.shape, generator=generator)
    return torch.where(choices == END, choices, 1 + (drawn * codes).long())


def block_without(planner: Planner, choices: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, C) and embeddings (B, C, D) as an executor reads them, without the concepts that are not seen (B, S) bool.

    Separators, ends and positions stay: the executor still reads how many concepts there are.
    """
    layout = planner.layout
    ids, embeds = planner.block(choices)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, layout.slot_columns.to(ids.device)] = ~seen & (choices != END)
    return ids.masked_fill(hidden, layout.vocabulary.pad), embeds
