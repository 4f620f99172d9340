"""What runs left: folders with a model, as decoders of prompts, and checkpoints with weights to export."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import nn

from app.build import checked_network
from app.run_files import newest
from lightning_modules.concept_baseline import ConceptBaselineModule
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.backbones import causal_lm
from models.backbones.autoregressive import AutoregressiveDecoder
from models.functional.errors import UsageError
from models.functional.vocabulary import vocabulary_size
from models.functional.weights import copy_weights
from models.interfaces.decoder import Decoder
from models.interfaces.executor import Executor
from models.online.decoder import OnlineConceptDecoder
from models.online.files import is_online, load_online
from models.online.model import OnlineConceptModel
from models.plans.decoder import PlannedDecoder
from models.plans.files import OPTIONS, fill_tables, load_backbone, read_options
from models.plans.plan_text import parse_plan

PLANNED = {kind.__name__: kind for kind in (ConceptPlannerExecutorModule, ConceptBaselineModule)}


def newest_model(runs: Path) -> Path:
    """The folder of the newest model that the experiment itself trained and left in model/."""
    advice = "it trains no student, and no run of it left a causal model in model/; mode=generate needs one of them"
    return newest(runs, "model/*.json", advice).parent


def load_model(folder: str | Path, option: str = "model.path") -> nn.Module:
    """A causal LM, an adapter on one, or an online concept model. option: what `folder` is the value of.

    Errors: UsageError for a folder that is none of them.
    """
    return load_online(folder) if is_online(folder) else causal_lm.load_trained(folder, option)


def load_planned(folder: str | Path) -> ConceptPlannerExecutorModule:
    """A planner-executor that `export` wrote, in evaluation mode."""
    options = read_options(folder)
    kind = PLANNED.get(options.pop("module"))
    if kind is None:
        raise UsageError(f"{folder}/{OPTIONS} names no module of this version; export the model again")
    module = kind(load_backbone(folder), **options)
    fill_tables(module.model, folder)
    return module.eval()


def trained_decoder(
    folder: Path,
    data: Any,
    temperature: float,
    device: torch.device,
    *,
    plan: str | None = None,
    forwards: int | None = None,
) -> Decoder:
    """The decoder of the model in a folder, whatever its kind, for prompts of the corpus.

    plan, forwards: of a planner-executor, concepts that are not drawn ("a=3 b=1"), and the forward passes of a parallel
    executor with its plan (None: as its run was told).
    """
    words, length, ends = vocabulary_size(data.tokenizer), data.response_length, data.end_ids()
    if (folder / OPTIONS).is_file():
        module = load_planned(folder)
        checked_network(module.model.backbone, data, "model")
        module.to(device)
        options: dict[str, Any] = {
            "plan_temperature": min(module.options.plan_temperature, temperature),
            "temperature": temperature,
        }
        executor = module.executor if forwards is None else _with_forwards(module, forwards)
        options["names"] = names = module.code_names(data)
        if plan is not None:
            options["fixed"] = parse_plan(module.model.vocabulary, plan, names)
        return PlannedDecoder(module.planner, executor, length, vocab_size=words, end_ids=ends, **options)
    model = checked_network(load_model(folder), data, "model").to(device)
    decoder = OnlineConceptDecoder if isinstance(model, OnlineConceptModel) else AutoregressiveDecoder
    return decoder(model, length, temperature=temperature, vocab_size=words, end_ids=ends)


def _with_forwards(module: ConceptPlannerExecutorModule, forwards: int) -> Executor:
    """The executor, with as many refinements as the forward passes allow. Errors: UsageError for a number that cannot be."""
    if module.options.executor == "autoregressive":
        raise UsageError(
            f"forwards={forwards}: this executor writes token after token, one forward pass each; leave forwards out"
        )
    least = len(module.planner.layout.rounds(module.planner.planning)) + 1
    if forwards < least:
        raise UsageError(f"forwards={forwards} must be at least {least}: those of a plan, and one for the text")
    return module.executor.refining(forwards - least)


def fill_from_checkpoint(module: LightningModule, path: str | Path) -> None:
    """Give a module a checkpoint's weights, the averaged ones where it holds some.

    Errors: UsageError for a module that exports nothing, and where the checkpoint is another module's.
    """
    if not hasattr(module, "export"):
        raise UsageError(f"mode=export: {type(module).__name__} has no weights of its own; there is nothing to export")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.startswith("TrainableEMA"):
            copy_weights(module, state["average"])
