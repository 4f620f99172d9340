"""Online concept models on disk: the backbone as transformers or peft write it, and beside it what is new."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.backbones import checkpoint_files as files
from models.backbones.causal_lm import load_trained
from models.functional.errors import UsageError
from models.online.model import OnlineConceptModel

FORMAT = "leap-online-concepts-1"
DESCRIPTION, WEIGHTS = "online_concepts.json", "online_concepts.safetensors"


def save_online(model: OnlineConceptModel, folder: str | Path, tokenizer=None) -> Path:
    """Write the backbone (or its adapter), online_concepts.safetensors and .json; a half-written folder never appears."""
    folder = Path(folder)
    new = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    with files.staging_folder(folder) as staging:
        model.backbone.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        save_file(new, staging / WEIGHTS)
        description = {"format": FORMAT, "options": asdict(model.options)}
        (staging / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def is_online(folder: str | Path) -> bool:
    return (Path(folder) / DESCRIPTION).is_file()


def load_online(folder: str | Path) -> OnlineConceptModel:
    """What `save_online` wrote, ready to answer. Errors: UsageError for a folder that is none, or of other weights."""
    folder = Path(folder)
    description = files.read_json(folder / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise UsageError(f"{folder} is of format {description.get('format')!r}; this version reads {FORMAT!r}")
    options = {"carry": False, "pool": False} | description["options"]  # earlier folders have no such weights
    model = OnlineConceptModel(load_trained(folder), **options)
    try:
        held = load_file(folder / WEIGHTS)
        missing = [name for name in model.load_state_dict(held, strict=False).missing_keys if "backbone." not in name]
        if missing:
            raise RuntimeError(f"it lacks {', '.join(missing)}")
    except (SafetensorError, FileNotFoundError, RuntimeError) as error:
        raise UsageError(f"{folder / WEIGHTS} cannot be read ({str(error).splitlines()[0]}); train it again") from error
    return model.eval()


def load_baseline(folder: str, model: OnlineConceptModel) -> nn.Module:
    """The causal LM to compare with. Raises UsageError where the folder has none, or one of another vocabulary."""
    base = load_trained(folder, "module.baseline")
    if base.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"module.baseline={folder} has {base.config.vocab_size} tokens, this model {model.config.vocab_size}; "
            "type the folder of a model trained on the same corpus"
        )
    return base
