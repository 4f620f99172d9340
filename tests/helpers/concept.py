"""A small unified model with types of different sizes and lengths, and rows for it."""

from itertools import product

import torch

from helpers.causal import tiny_causal
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.functional.plan_nll import plan_nll
from models.plans.executor import AutoregressiveExecutor
from models.plans.planner import Planner
from models.plans.terms import NAMES
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary

BASE = 11
TYPES = {
    "a": {"codes": 3, "most": 2, "least": 0},
    "b": {"codes": 2, "most": 1},
    "c": {"codes": 3, "most": 3, "least": 1},
}


def concept_parts(types=TYPES, base: int = BASE, **options) -> tuple[UnifiedModel, Planner, AutoregressiveExecutor]:
    """In float64, with weights so large that every choice and every token matters."""
    torch.manual_seed(0)
    model = UnifiedModel(tiny_causal(base, **options), ConceptVocabulary(types, base)).double()
    for weight, std in (
        (model.new_embedding.weight, 0.7),
        (model.new_head.weight, 0.3),
        (model.type_embedding.weight, 0.7),
    ):
        torch.nn.init.normal_(weight, std=std)
    return model.eval(), Planner(model), AutoregressiveExecutor(model)


def some_texts(rows: int = 5, columns: int = 4, base: int = BASE) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, all of them real."""
    ids = torch.randint(3, base, (rows, columns), generator=torch.Generator().manual_seed(7))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_prob(planner, text, mask, choices):
    log_p = planner.score(text, mask, choices).log_softmax(-1)
    return -plan_nll(log_p, choices, planner.layout.open_slots(choices)).sum(-1)


def every_plan(layout) -> torch.Tensor:
    """All plans of TYPES, as choices."""
    v, plans = layout.vocabulary, []
    for plan in product(*(row.nonzero().flatten().tolist() for row in v.possible)):
        choices = torch.tensor([plan])
        if torch.equal(choices, choices.masked_fill(~layout.open_slots(choices), 0)):
            plans.append(choices)
    return torch.cat(plans)


SIGNALS = {"a": "who", "b": "where", "c": "events"}


ALL = dict.fromkeys(NAMES, 1.0)
# plans that are drawn from the posterior and trained straight through
DRAWN = {
    "sampler": "gumbel_st",
    "planning": {"prior": "sequential", "posterior": "sequential"},
    "posterior_reads": "all",
    "search": None,
}


def build_planner_executor(data, types=TYPES, **options) -> ConceptPlannerExecutorModule:
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    wanted = (
        {"types": types, "weights": ALL, "quota": 2.0, "lr": 3e-3, "warmup_steps": 1, "seed": 7}
        | {"signals": {kind: signal for kind, signal in SIGNALS.items() if kind in types}}
        | DRAWN
        | options
    )
    return ConceptPlannerExecutorModule(model, **wanted)


def batch_of(data, rows: int = 8, split: str = "train") -> dict[str, torch.Tensor]:
    return {name: column[:rows] for name, column in data.rows[split].columns.items()}


TWO_TYPE_WEIGHTS = {"text": 1.0, "planner": 1.0, "usage": 1.0}


def two_type_module(data, codes: int) -> ConceptPlannerExecutorModule:
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    types = {name: {"codes": codes, "most": 1} for name in "ab"}
    options = {"lr": 1e-2, "warmup_steps": 5, "corruption": (1.0, 0.0), "seed": 7} | DRAWN
    return ConceptPlannerExecutorModule(model, types=types, weights=TWO_TYPE_WEIGHTS, **options)


def only_few(data) -> None:
    """Four texts, so that a short training learns a plan for each."""
    columns = data.rows["train"].columns
    for split in ("train", "val", "test"):
        data.rows[split].columns = {name: column[torch.arange(64) % 4] for name, column in columns.items()}
