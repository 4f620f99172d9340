"""A small unified model with types of different sizes and lengths, and rows for it."""

import torch
from helpers_causal import tiny_causal

from models.concept.executor import Executor
from models.concept.planner import Planner
from models.concept.unified import UnifiedModel
from models.concept.vocabulary import ConceptVocabulary

BASE = 11
TYPES = {
    "a": {"codes": 3, "most": 2, "least": 0},
    "b": {"codes": 2, "most": 1},
    "c": {"codes": 3, "most": 3, "least": 1},
}


def concept_parts(types=TYPES, base: int = BASE, **options) -> tuple[UnifiedModel, Planner, Executor]:
    """In float64, with weights so large that every choice and every token matters."""
    torch.manual_seed(0)
    model = UnifiedModel(tiny_causal(base, **options), ConceptVocabulary(types, base)).double()
    for weight, std in (
        (model.new_embedding.weight, 0.7),
        (model.new_head.weight, 0.3),
        (model.type_embedding.weight, 0.7),
    ):
        torch.nn.init.normal_(weight, std=std)
    return model.eval(), Planner(model), Executor(model)


def some_texts(rows: int = 5, columns: int = 4, base: int = BASE) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, all of them real."""
    ids = torch.randint(3, base, (rows, columns), generator=torch.Generator().manual_seed(7))
    return ids, torch.ones_like(ids, dtype=torch.bool)
