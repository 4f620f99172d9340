"""A planner-executor in a folder: `backbone/` for transformers, the new tables in safetensors, and the options in JSON."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from models.backbones import checkpoint_files as files
from models.backbones.causal_lm import load_causal, save_merged
from models.functional.errors import UsageError
from models.plans.unified import UnifiedModel

FORMAT = "leap-concepts-1"
OPTIONS, TABLES, BACKBONE = "concepts.json", "concepts.safetensors", "backbone"


def save_plans(model: UnifiedModel, folder: str | Path, options: dict[str, Any], tokenizer: Any = None) -> Path:
    """Write the folder whole: the backbone with its adapters added in, and everything else that the model holds.

    options: plain types, given back by `read_options`.
    """
    folder = Path(folder)
    with files.staging_folder(folder) as staging:
        save_merged(model.backbone, staging / BACKBONE, tokenizer)
        save_file({name: tensor.contiguous() for name, tensor in _tables(model).items()}, staging / TABLES)
        (staging / OPTIONS).write_text(json.dumps({"format": FORMAT, "options": options}, indent=2) + "\n")
    return folder


def read_options(folder: str | Path) -> dict[str, Any]:
    """Errors: UsageError for a folder of another format."""
    found = files.read_json(Path(folder) / OPTIONS)
    if found.get("format") != FORMAT:
        raise UsageError(f"{folder}/{OPTIONS} is of format {found.get('format')}, not {FORMAT}; export the model again")
    return found["options"]


def load_backbone(folder: str | Path) -> PreTrainedModel:
    return load_causal(Path(folder) / BACKBONE)


def fill_tables(model: UnifiedModel, folder: str | Path) -> None:
    """Give a model, built with the same options on the same backbone, the tables of the folder.

    Errors: UsageError where they do not fit.
    """
    held, wanted = load_file(Path(folder) / TABLES), _tables(model)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tables.items()} for tables in (held, wanted)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{folder}/{TABLES} holds {shapes[0]}, its options ask for {shapes[1]}; export the model again"
        )
    for name, tensor in held.items():
        wanted[name].copy_(tensor)


def _tables(model: nn.Module) -> dict:
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
